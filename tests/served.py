"""Tiny models that the engines serve, with saved adapters that move their logits by more than one."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import apportion
from apportion.profiling.run import profile
from tiny_models import TINY

_COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": TINY["olmoe"] | {"num_key_value_heads": 4},  # llama.cpp has no grouped attention for it
    "mixtral": TINY["mixtral"],
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
    "deepseek_v3": TINY["deepseek_v3"] | {"scoring_func": "sigmoid"},
    "deepseek_v2": TINY["deepseek_v3"] | {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "gpt_oss": TINY["gpt_oss"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
}

TOKENS = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    """A model, a method and its options; of its sites only those whose names match a pattern."""

    family: str
    method: str = "hellora"
    options: dict[str, Any] = field(default_factory=dict)
    only: str = ""

    @property
    def name(self) -> str:
        """A name for test reports."""
        words = [self.family, self.method, *map(str, self.options.values()), self.only]
        return re.sub(r"[^\w.+-]", "+", "-".join(word for word in words if word))


EXPERTS: dict[str, Any] = {"hot": 3, "targets": "attention,experts"}
FULL: dict[str, Any] = {"hot": 3, "targets": "attention,router,experts"}


def build_served(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build one of the models with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_COMMON | FAMILIES[family] | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save_case(case: Case, folder: Path, seed: int = 0, changes: dict[str, Any] | None = None) -> tuple[Path, Tensor]:
    """Save a case's base model in ``base`` and its adapter; return the adapter's folder and the logits with it."""
    model = build_served(case.family, **changes or {})
    if not (folder / "base").exists():
        model.save_pretrained(folder / "base")
    with torch.no_grad():
        plain = model(input_ids=TOKENS).logits
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    measured = profile(model, [batch], sensitivity=case.method == "marginal")
    plan = apportion.plan(measured, case.method, rank=4, alpha=6.0, **case.options)
    placements = tuple(each for each in plan.placements if re.search(case.only, each.site))
    adapted = apportion.apply(model, dataclasses.replace(plan, base_model=str(folder / "base"), placements=placements))
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=1.0 if plan.is_sparse else 0.5)
    with torch.no_grad():
        logits = adapted.eval()(input_ids=TOKENS).logits
    assert (logits - plain).abs().max() > 1
    adapted.save_pretrained(folder / case.name)
    return folder / case.name, logits
