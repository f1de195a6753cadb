"""Read an exported folder with stock PEFT's own loader, without the base model's weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from apportion.errors import ConfigurationError
from apportion.formats.factors import SavedAdapter
from apportion.formats.pairs import Pair, nonzero
from apportion.formats.peft_lora import PREFIX, nested, stacked_parameters
from apportion.records.outputs import ADAPTER_TENSORS_FILE


def read_back(adapter: SavedAdapter, folder: Path) -> Iterator[Pair]:
    """Load a folder that `write` wrote into the base model without its weights, by PEFT's own loader.

    Args:
        adapter: The adapter that was written.
        folder: The folder.

    Yields:
        The pairs that are not zero.

    Raises:
        ConfigurationError: PEFT does not load the whole adapter.
    """
    tensors = _loaded(adapter.empty_base(), folder)
    targets = set(LoraConfig.from_pretrained(folder).target_parameters or ())
    for parameter, key in nested(each for each in stacked_parameters(adapter) if each.path in targets):
        yield from parameter.unfuse(*(tensors.pop(f"{PREFIX}{key}.lora_{part}.weight") for part in "AB"))
    for name in sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}):
        a_RI, b_OR = (tensors[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        yield from nonzero(Pair(adapter.layout.by_name[name], a_RI, b_OR))


def _loaded(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Attach an adapter to a model on the meta device, and return the factors that PEFT put there, by their names."""
    tensors = load_file(folder / ADAPTER_TENSORS_FILE)
    dtype = next(iter(tensors.values())).dtype
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says that patterns of stacked parameters match nothing; they do
            attached = get_peft_model(model, LoraConfig.from_pretrained(folder), autocast_adapter_dtype=False)
            for name, module in attached.named_modules():
                if name.endswith((".lora_A", ".lora_B")):
                    module.to_empty(device="cpu").to(dtype)
            result = set_peft_model_state_dict(attached, dict(tensors))
    except (ValueError, RuntimeError, KeyError) as error:
        raise _not_loaded([str(error).strip().partition("\n")[0]]) from error
    missing = [name.removeprefix(PREFIX) for name in result.missing_keys if ".lora_" in name]
    if missing or result.unexpected_keys:
        raise _not_loaded([*missing, *result.unexpected_keys])
    named = attached.named_parameters()
    return {name.replace(".default.", "."): each.detach() for name, each in named if ".lora_" in name}


def _not_loaded(found: list[str]) -> ConfigurationError:
    """Return the error for an adapter that PEFT does not load whole."""
    return ConfigurationError(
        f"PEFT {version('peft')} does not load this adapter whole on this architecture; nothing was written.",
        found=found,
        fix="merge the adapter into the model (apportion merge)",
    )
