"""Stock PEFT's LoRA: what every reader of adapters knows, for adapters of linear layers alone."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from apportion.errors import ConfigurationError
from apportion.formats.factors import SavedAdapter
from apportion.records.outputs import ADAPTER_TENSORS_FILE


def check(adapter: SavedAdapter) -> None:
    """Refuse an adapter that plain LoRA cannot express.

    Args:
        adapter: The adapter.

    Raises:
        ConfigurationError: it has routed LoRA experts, or stands on something other than linear layers.
    """
    for placement in adapter.plan.placements:
        is_linear = adapter.layout.by_name[placement.site].storage == "linear"
        if placement.is_routed or not is_linear:
            reason = "several LoRA experts" if placement.is_routed else "no linear layer of its own"
            raise ConfigurationError(
                f"{placement.site} has {reason}, which plain LoRA cannot express.",
                fix="merge the adapter into the model, or plan with targets attention,shared,dense",
            )


def write(adapter: SavedAdapter, folder: Path, dtype: torch.dtype | None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``: frozen factors drawn, sparse ones made dense.

    Args:
        adapter: An adapter that `check` accepts.
        folder: The output folder.
        dtype: Type of the factors; as they are stored if None.
    """
    tensors, ranks, alphas = {}, {}, {}
    for site, placement, a_RI, b_OR, _ in adapter.factors():
        ranks[site.name], alphas[site.name] = len(a_RI), placement.alpha * (len(a_RI) / placement.rank)
        for name, factor in (("lora_A", a_RI), ("lora_B", b_OR)):
            tensors[f"base_model.model.{site.name}.{name}.weight"] = factor.to(dtype or factor.dtype).contiguous()
    plan = adapter.plan
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        target_modules=list(ranks),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != plan.rank},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != plan.alpha},
        task_type=adapter.config.task_type,
        base_model_name_or_path=adapter.config.base_model_name_or_path,
        inference_mode=True,
    )
    save_file(tensors, folder / ADAPTER_TENSORS_FILE, metadata={"format": "pt"})
    config.save_pretrained(folder)
