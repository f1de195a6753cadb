"""The expert adapter against plain dense algebra, and against PEFT's own adapter on all experts."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import apportion
from adapted_experts import stack_of
from apportion.adapters.hosts.experts import ExpertLora
from apportion.profiling.run import profile as measure
from tiny_models import build_tiny

RANK, ALPHA = 4, 12.0


def _adapted(model: nn.Module, tokens: Tensor, method: str, **options: object) -> nn.Module:
    plan = apportion.plan(
        measure(model, [{"input_ids": tokens}]), method, rank=RANK, alpha=ALPHA, targets="experts", **options
    )
    adapted = apportion.apply(model, plan)
    with torch.no_grad():
        for module in adapted.modules():
            if isinstance(module, ExpertLora):
                for parameter in stack_of(module).lora_B.parameters():
                    parameter.normal_(std=0.1)
    return adapted


def _dense_experts(
    layer: ExpertLora, hidden: Tensor, ids: Tensor, weights: Tensor, factors: dict[str, Tensor]
) -> Tensor:
    """Run a SwiGLU experts layer token by token and slot by slot, on weights with the adapter written out."""
    base = layer.base_layer

    def weight(name: str, expert: int) -> Tensor:
        width = base.gate_up_proj.shape[1] // 2
        stored = {
            "gate_proj": base.gate_up_proj[expert, :width],
            "up_proj": base.gate_up_proj[expert, width:],
            "down_proj": base.down_proj[expert],
        }[name]
        key = f"{expert}.{name}"
        if f"{key}.A" not in factors:
            return stored
        return stored + ALPHA / RANK * factors[f"{key}.B"] @ factors[f"{key}.A"]

    rows = []
    for token in range(len(hidden)):
        total = torch.zeros_like(hidden[token])
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            gate = weight("gate_proj", expert) @ hidden[token]
            up = weight("up_proj", expert) @ hidden[token]
            total = total + weights[token, slot] * (weight("down_proj", expert) @ (nn.functional.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def test_output_and_gradients_equal_dense_algebra(tokens: Tensor) -> None:
    model = build_tiny("olmoe").requires_grad_(requires_grad=False)
    adapted = _adapted(model, tokens, "hellora", hot=3)
    layer = next(module for module in adapted.modules() if isinstance(module, ExpertLora))
    factors = {}
    stack = stack_of(layer)
    for name, planned in stack.planned.items():
        for side, stacked in (("A", stack.lora_A), ("B", stack.lora_B)):
            parts = stacked[name].detach().split(list(planned.ranks))
            for expert, part in zip(planned.experts, parts, strict=True):
                value = part.clone() if side == "A" else part.t().clone()
                factors[f"{expert}.{name}.{side}"] = value.requires_grad_()
    hidden = torch.randn(40, 32, requires_grad=True)
    ids = torch.stack([torch.randperm(8)[:2] for _ in range(40)])
    weights = torch.rand(40, 2, requires_grad=True)
    direction = torch.randn(40, 32)

    found = layer(hidden, ids, weights)
    (found * direction).sum().backward()
    found_grads = (hidden.grad.clone(), weights.grad.clone())
    hidden.grad = weights.grad = None
    expected = _dense_experts(layer, hidden, ids, weights, factors)
    (expected * direction).sum().backward()

    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(found_grads[0], hidden.grad, atol=1e-5)
    assert torch.allclose(found_grads[1], weights.grad, atol=1e-5)
    assert len(factors) == 3 * 3 * 2
    for name, planned in stack.planned.items():
        for side, stacked in (("A", stack.lora_A), ("B", stack.lora_B)):
            parts = stacked[name].grad.split(list(planned.ranks))
            for expert, part in zip(planned.experts, parts, strict=True):
                grad = factors[f"{expert}.{name}.{side}"].grad
                assert torch.allclose(part if side == "A" else part.t(), grad, atol=1e-5), (expert, name, side)
    assert all(parameter.grad is None for parameter in layer.base_layer.parameters())


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "gpt_oss"])
def test_all_experts_equal_peft(name: str, tokens: Tensor) -> None:
    """PEFT adapts fused gate and up with one pair of factors: ours fit in, block-diagonal, at twice the rank."""
    base = build_tiny(name)
    stock = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(
            r=2 * RANK,
            lora_alpha=2 * ALPHA,
            target_modules=[],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        ),
    )
    ours = _adapted(base, tokens, "lora")
    theirs = dict(stock.named_modules())
    for path, module in ours.named_modules():
        if isinstance(module, ExpertLora):
            _copy_into(module, theirs[path], theirs[f"{path}.base_layer"])
    with torch.no_grad():
        found = ours(input_ids=tokens, labels=tokens)
        expected = stock(input_ids=tokens, labels=tokens)
        plain = build_tiny(name)(input_ids=tokens, labels=tokens)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert float(found.loss) == pytest.approx(float(expected.loss), abs=1e-6)
    assert not torch.allclose(plain.logits, expected.logits, atol=1e-3)


@torch.no_grad()
def _copy_into(ours: ExpertLora, outer: nn.Module, inner: nn.Module) -> None:
    """Write our factors as PEFT's: A is expert-slowest, B expert-fastest; the outer wrapper holds ``down_proj``."""
    by_parameter = {wrapper.parameter_name: wrapper for wrapper in (outer, inner)}
    num_experts = ours.base_layer.down_proj.shape[0]
    a = {n: stack_of(ours).lora_A[n].view(num_experts, RANK, -1) for n in ("gate_proj", "up_proj", "down_proj")}
    b = {n: stack_of(ours).lora_B[n].view(num_experts, RANK, -1) for n in a}
    width = b["gate_proj"].shape[-1]

    gate_up = by_parameter["gate_up_proj"]
    stacked_a = torch.cat([a["gate_proj"], a["up_proj"]], dim=1)  # (E, 2R, D)
    stacked_b = torch.zeros(num_experts, 2 * width, 2 * RANK)  # (E, 2F, 2R)
    even = ours.base_layer.is_concatenated
    gate_rows, up_rows = (slice(width), slice(width, None)) if even else (slice(0, None, 2), slice(1, None, 2))
    stacked_b[:, gate_rows, :RANK] = b["gate_proj"].transpose(1, 2)
    stacked_b[:, up_rows, RANK:] = b["up_proj"].transpose(1, 2)
    gate_up.lora_A["default"].weight.copy_(stacked_a.flatten(0, 1))
    gate_up.lora_B["default"].weight.copy_(stacked_b.permute(1, 2, 0).flatten(1))

    down = by_parameter["down_proj"]
    padded_a = torch.cat([a["down_proj"], torch.zeros_like(a["down_proj"])], dim=1)
    padded_b = torch.cat([b["down_proj"], torch.zeros_like(b["down_proj"])], dim=1).transpose(1, 2)
    down.lora_A["default"].weight.copy_(padded_a.flatten(0, 1))
    down.lora_B["default"].weight.copy_(padded_b.permute(1, 2, 0).flatten(1))
