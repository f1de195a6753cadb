"""`import_adapter`: an adapter of stock PEFT becomes one of this package."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from apportion.accounting import empty_model
from apportion.discovery import find_sites
from apportion.errors import AdapterError, ConfigurationError, shortened
from apportion.formats.factors import read_adapter
from apportion.formats.peft_loaded import Loaded, loaded_pairs
from apportion.methods.planning import count_cost, even_profile
from apportion.peft.config import ApportionConfig
from apportion.peft.state import PREFIX, digests, non_finite
from apportion.records.files import whole_file, whole_folder
from apportion.records.json_file import read_json
from apportion.records.outputs import ADAPTER_CONFIG_FILE, ADAPTER_TENSORS_FILE, check_output_folder
from apportion.records.placement import Placement
from apportion.records.plan import Plan
from apportion.records.plan_schema import in_file_order
from apportion.records.shapes import LowRank
from apportion.records.site import Layout

IMPORTED = "imported"

# Fields of PEFT's configuration that make something other than a product of two matrices, or add something to it.
_VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication",
    "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config", "megatron_config",
)  # fmt: skip

_CHANGING_THE_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # ways to start that subtract from the base's weights


def import_adapter(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write an adapter of stock PEFT as one of this package, to merge, combine, export and continue it.

    PEFT's own loader reads the adapter, so all that it loads is understood: adapters on linear layers, on stacked
    experts, and with one pair of factors per expert. Experts and ranks that are zeros are left out.

    Args:
        path: Folder with ``adapter_config.json`` of peft_type LORA and ``adapter_model.safetensors``.
        output: The folder to write.
        model: The base model, if the adapter does not name it or it lies elsewhere now; only its configuration is read.
        trust_remote_code: Run Python code that comes with the base model.

    Returns:
        The output folder. Its plan's method is ``imported``; its costs assume even routing.

    Raises:
        ConfigurationError: there is no such adapter, it is of another kind, PEFT does not load it, or it stands on
            something that is no site.
        AdapterError: its files are damaged.
        OutputExistsError: the output folder has something in it.
    """
    folder = check_output_folder(output, inputs=(path,), renamed=True)
    config = _read_config(Path(path))
    base = model or config.base_model_name_or_path
    if not base:
        raise ConfigurationError(f"the adapter in {path} does not say which model it is for.", fix="give --model")
    empty = empty_model(base, trust_remote_code=trust_remote_code)
    layout = find_sites(empty)
    loaded = {each.pair.site.name: each for each in loaded_pairs(empty, layout, Path(path))}
    if not loaded:
        raise ConfigurationError(f"the adapter in {path} changes nothing: all of its products are zero.")
    plan = _plan(layout, loaded, os.fspath(base))
    with whole_folder(folder) as temporary:
        _write(temporary, plan, {name: loaded[name] for name in (each.site for each in plan.placements)}, config)
        read_adapter(temporary, base, trust_remote_code=trust_remote_code)
    return folder


def _read_config(folder: Path) -> LoraConfig:
    """Read PEFT's configuration, and refuse all that is not plain LoRA."""
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_TENSORS_FILE):
        if not (folder / name).is_file():
            raise ConfigurationError(f"there is no adapter in {folder}.", fix=f"give a folder with {name}")

    def damaged(found: str) -> AdapterError:
        return AdapterError(f"{folder / ADAPTER_CONFIG_FILE} cannot be read.", found=found, fix="copy it again")

    fields: dict[str, Any] = read_json(folder / ADAPTER_CONFIG_FILE, damaged)
    if fields.get("peft_type") != "LORA":
        raise ConfigurationError(
            f"the adapter in {folder} is not one of stock LoRA.", found=shortened(str(fields.get("peft_type")))
        )
    variants = [name for name in _VARIANTS if fields.get(name)]
    variants += ["bias"] if fields.get("bias", "none") != "none" else []
    variants += ["init_lora_weights"] if str(fields.get("init_lora_weights")).startswith(_CHANGING_THE_BASE) else []
    if variants:
        raise ConfigurationError(f"the adapter in {folder} is not plain LoRA.", found=variants)
    try:
        return LoraConfig.from_pretrained(folder)
    except (TypeError, ValueError, KeyError) as error:
        raise damaged(shortened(str(error), 300)) from error


def _plan(layout: Layout, loaded: dict[str, Loaded], base: str) -> Plan:
    """Describe what was loaded as a plan."""
    placements = in_file_order(
        Placement(name, LowRank(rank, each.scale * rank))
        for name, each in loaded.items()
        for rank in (each.pair.a_RI.shape[0],)
    )
    shape = Counter(placement.shape for placement in placements).most_common(1)[0][0]
    return Plan(
        method=IMPORTED,
        options={},
        rank=shape.rank,
        alpha=shape.alpha,
        seed=0,
        model=layout.describe(),
        base_model=base,
        fingerprint=layout.fingerprint,
        profile_digest=None,
        cost=count_cost(even_profile(layout), placements, placements, "even"),
        placements=placements,
    )


def _write(folder: Path, plan: Plan, loaded: dict[str, Loaded], config: LoraConfig) -> None:
    """Write an adapter's two files."""
    tensors: dict[str, Tensor] = {}
    for name, ((_, a_RI, b_OR), _) in loaded.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a_RI.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b_OR.contiguous()
    bad = non_finite(tensors)
    if bad:
        raise AdapterError(f"{bad[0]} is not finite.", fix="copy the adapter again, or train it again")
    ours = ApportionConfig(
        plan=plan,
        r=plan.rank,
        lora_alpha=plan.alpha,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    ours.tensor_digests = digests(tensors)
    with whole_file(folder / ADAPTER_TENSORS_FILE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    ours.save_pretrained(str(folder))
