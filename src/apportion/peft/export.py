"""Export adapters as plain LoRA, for software without this package."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from peft import LoraConfig, PeftModel
from safetensors.torch import save_file

from apportion.discovery import find_sites
from apportion.errors import ConfigurationError
from apportion.peft.config import ApportionConfig
from apportion.peft.factors import site_factors
from apportion.records.files import require_empty, whole_file, write_text


def export_lora(model: PeftModel, folder: str | os.PathLike[str], *, adapter_name: str = "default") -> None:
    """Write an adapter as plain PEFT LoRA. Frozen factors are drawn, sparse ones made dense.

    Args:
        model: The model with the adapter.
        folder: Folder for ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_name: The adapter.

    Raises:
        ConfigurationError: the adapter has routed LoRA experts, or is on modules other than linear layers.
        OutputExistsError: the folder is not empty.
    """
    config: ApportionConfig = model.peft_config[adapter_name]
    plan, sites = config.read_plan(), find_sites(model).by_name
    for placement in plan.placements:
        if placement.is_routed or sites[placement.site].storage != "linear":
            reason = "has several LoRA experts" if placement.is_routed else "is not a separate linear layer"
            raise ConfigurationError(
                f"{placement.site} {reason}, which plain LoRA cannot represent.",
                fix="merge the adapter into the model, or plan with targets attention,shared,dense",
            )
    require_empty(Path(folder))
    tensors = {}
    for site, a_RI, b_OR in site_factors(model, adapter_name):
        tensors[f"base_model.model.{site}.lora_A.weight"] = a_RI.contiguous().cpu()
        tensors[f"base_model.model.{site}.lora_B.weight"] = b_OR.contiguous().cpu()
    ranks = {p.site: p.rank for p in plan.placements}
    alphas = {p.site: p.alpha for p in plan.placements}
    plain = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        target_modules=list(ranks),
        rank_pattern={site: rank for site, rank in ranks.items() if rank != plan.rank},
        alpha_pattern={site: alpha for site, alpha in alphas.items() if alpha != plan.alpha},
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with whole_file(target / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_text(target / "adapter_config.json", _as_json(plain))


def _as_json(config: LoraConfig) -> str:
    """Write a configuration as PEFT does."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return Path(folder, "adapter_config.json").read_text()
