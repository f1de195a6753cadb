"""DeepSeekMoE: a checkpoint in the published layout loads, and computes what the paper's equations say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import apportion
import apportion.models
from tiny_models import build_dense

CONFIG = {
    "architectures": ["DeepseekForCausalLM"],
    "model_type": "deepseek",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _published() -> dict[str, Tensor]:
    """Draw weights under the names of the published checkpoint: one matrix an expert and projection."""
    generator = torch.Generator().manual_seed(0)
    width, inner, dense = 32, 16, 48
    shapes = {"model.embed_tokens.weight": (64, width), "lm_head.weight": (64, width), "model.norm.weight": (width,)}
    for layer in range(3):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{stem}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        mlps = {f"{stem}.mlp": dense}
        if layer:
            shapes[f"{stem}.mlp.gate.weight"] = (6, width)
            mlps = {f"{stem}.mlp.experts.{expert}": inner for expert in range(6)}
            mlps[f"{stem}.mlp.shared_experts"] = 2 * inner
        for mlp, size in mlps.items():
            shapes |= {f"{mlp}.gate_proj.weight": (size, width), f"{mlp}.up_proj.weight": (size, width)}
            shapes[f"{mlp}.down_proj.weight"] = (width, size)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def _reference(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Compute the logits of one sequence with plain products, one token and one expert at a time."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name]

    def mlp(x: Tensor, stem: str) -> Tensor:
        gate, up, down = (weights[f"{stem}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()

    def rotate(x: Tensor) -> Tensor:
        angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x[..., :4], x[..., 4:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(3):
        stem = f"model.layers.{layer}"
        hidden = norm(x, f"{stem}.input_layernorm.weight")
        q, k, v = ((hidden @ weights[f"{stem}.self_attn.{n}_proj.weight"].t()).view(-1, 4, 8) for n in "qkv")
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / math.sqrt(8)
        future = torch.ones(len(x), len(x)).triu(1).bool()
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -math.inf).softmax(-1), v).flatten(1)
        x = x + attended @ weights[f"{stem}.self_attn.o_proj.weight"].t()
        hidden = norm(x, f"{stem}.post_attention_layernorm.weight")
        if layer == 0:
            x = x + mlp(hidden, f"{stem}.mlp")
            continue
        added = mlp(hidden, f"{stem}.mlp.shared_experts")
        chances = (hidden @ weights[f"{stem}.mlp.gate.weight"].t()).softmax(-1)
        for row in range(len(x)):
            for expert in chances[row].topk(2).indices.tolist():
                added[row] += chances[row, expert] * mlp(hidden[row], f"{stem}.mlp.experts.{expert}")
        x = x + added
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].t()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(_published(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_the_published_layout_loads_and_computes(checkpoint: Path, implementation: str) -> None:
    build_dense()  # transformers remembers of Llama that it has no experts
    model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation=implementation).eval()
    tokens = torch.randint(3, 64, (12,))
    with torch.no_grad():
        found = model(input_ids=tokens[None]).logits[0]
    assert torch.allclose(found, _reference(_published(), tokens), atol=1e-5)


def test_it_saves_in_the_published_layout(checkpoint: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "again")
    found, expected = load_file(tmp_path / "again" / "model.safetensors"), _published()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_it_is_profiled_planned_and_adapted(checkpoint: Path, tokens: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    profile = apportion.profile(model, [{"input_ids": tokens}])
    assert profile.counts["default"].sum(1).tolist() == [tokens.numel() * 2] * 2
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        adapted = apportion.apply(model, apportion.plan(profile, "hellora", hot=2, rank=4))
        assert torch.allclose(adapted(input_ids=tokens).logits, before, atol=1e-5)
    assert adapted.receipt.sites_by_kind == {"attention": 12, "dense": 3, "router": 2, "shared": 6, "experts": 12}
