"""Read an exported folder with stock PEFT's own loader, without the base model's weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel

from apportion.errors import ConfigurationError
from apportion.formats.factors import SavedAdapter
from apportion.formats.fused import fused_parameters
from apportion.formats.pairs import Pair, nonzero
from apportion.formats.peft_lora import PREFIX
from apportion.records.outputs import ADAPTER_TENSORS_FILE
from apportion.records.site import Layout


class Loaded(NamedTuple):
    """What PEFT adds to one matrix: ``scale * (b_OR @ a_RI)``."""

    pair: Pair
    scale: float


def read_back(adapter: SavedAdapter, folder: Path) -> Iterator[Pair]:
    """Load a folder that an export wrote into the base model without its weights, by PEFT's own loader.

    Args:
        adapter: The adapter that was written.
        folder: The folder.

    Yields:
        The pairs that are not zero.

    Raises:
        ConfigurationError: PEFT does not load the whole adapter.
    """
    for pair, scale in loaded_pairs(adapter.empty_base(), adapter.layout, folder):
        yield pair._replace(b_OR=pair.b_OR * scale)


def loaded_pairs(model: PreTrainedModel, layout: Layout, folder: Path) -> Iterator[Loaded]:
    """Attach an adapter to a model on the meta device by PEFT's own loader, and take out what it put there.

    Args:
        model: The base model without its weights.
        layout: Its sites.
        folder: An adapter for stock PEFT.

    Yields:
        The pairs that are not zero, in the model's order.

    Raises:
        ConfigurationError: PEFT does not load the whole adapter, or it stands on something that is no site.
    """
    attached = _attached(model, folder)
    wrappers = [(name, each) for name, each in attached.named_modules() if isinstance(each, LoraLayer)]
    blocks = {block.name: block for block in layout.blocks if block.storage == "fused"}
    for name, wrapper in wrappers:
        module = re.sub(r"(\.base_layer)+$", "", name.removeprefix(PREFIX))
        factors = [getattr(wrapper, part)["default"].weight.detach() for part in ("lora_A", "lora_B")]
        parameter, scale = getattr(wrapper, "parameter_name", "weight"), wrapper.scaling["default"]
        if module in blocks:
            experts = wrapper.get_base_layer()
            stacked = next(each for each in fused_parameters(experts, blocks[module]) if each.name == parameter)
            yield from (Loaded(pair, scale) for pair in stacked.unfuse(*factors))
        elif module in layout.by_name:
            yield from (Loaded(pair, scale) for pair in nonzero(Pair(layout.by_name[module], *factors)))
        else:
            raise ConfigurationError(
                f"the adapter in {folder} stands on {module}, which is no place for an adapter here.",
                fix="use it with PEFT itself",
            )


def _attached(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Attach an adapter to a model on the meta device, with the factors on the CPU."""
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
    return attached


def _not_loaded(found: list[str]) -> ConfigurationError:
    """Return the error for an adapter that PEFT does not load whole."""
    return ConfigurationError(
        f"PEFT {version('peft')} does not load this adapter whole on this architecture; nothing was written.",
        found=found,
        fix="merge the adapter into the model (apportion merge)",
    )
