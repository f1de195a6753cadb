"""Routed LoRA: equal to the plain sum over experts, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from apportion.adapters.hosts.linear import LinearLora
from apportion.adapters.shapes.sparse import SparseOptions
from apportion.peft.shapes import make_shape
from apportion.records.shapes.registry import lora_shape


def _adapted(base: nn.Linear, rank: int, num_experts: int, top_k: int) -> LinearLora:
    """Add random LoRA experts with scale 2."""
    layer = LinearLora(base)
    record = lora_shape(rank, 2.0 * rank, num_experts=num_experts, top_k=top_k)
    layer.add_adapter("default", make_shape(record, layer.place(), SparseOptions()))
    for parameter in layer.lora_shape.parameters():
        nn.init.normal_(parameter)
    return layer


def _layer(num_experts: int, top_k: int, rank: int = 3, dtype: torch.dtype = torch.float64) -> LinearLora:
    layer = _adapted(nn.Linear(7, 5, dtype=dtype), rank, num_experts, top_k)
    layer.set_adapter("default")
    return layer


def plain_sum(layer: LinearLora, x: Tensor) -> Tensor:
    """Add up the experts one by one, token by token."""
    shape = layer.lora_shape["default"]
    router = shape.lora_router.weight if shape.is_gated else x.new_zeros(1, x.shape[-1])
    num_experts, top_k = len(router), getattr(shape, "top_k", 1)
    a, b = shape.lora_A.weight.chunk(num_experts, 0), shape.lora_B.weight.chunk(num_experts, 1)
    outputs = []
    for token in x.reshape(-1, x.shape[-1]):
        out = layer.base_layer(token)
        probabilities = (router @ token).softmax(0)
        chosen = probabilities.argsort(descending=True)[:top_k]
        for expert in chosen.tolist():
            gate = probabilities[expert] / probabilities[chosen].sum()
            out = out + shape.scale * gate * (b[expert] @ (a[expert] @ token))
        outputs.append(out)
    return torch.stack(outputs).view(*x.shape[:-1], -1)


@given(num_experts=st.integers(1, 6), top_k=st.integers(1, 6), seed=st.integers(0, 99))
def test_equals_the_plain_sum_over_experts(num_experts: int, top_k: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = _layer(num_experts, min(top_k, num_experts))
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    weights = [x, *layer.lora_shape.parameters()]
    direction = torch.randn(2, 4, 5, dtype=torch.float64)
    found, expected = layer(x), plain_sum(layer, x)
    assert torch.allclose(found, expected, atol=1e-9)
    for one, other in zip(
        torch.autograd.grad((found * direction).sum(), weights),
        torch.autograd.grad((expected * direction).sum(), weights),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-9)


def test_nothing_as_large_as_tokens_by_experts_by_width_is_made() -> None:
    layer = _adapted(nn.Linear(64, 64), rank=2, num_experts=8, top_k=2)
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, Tensor) else 0)
            return out

    with Watch():
        layer(torch.randn(32, 64))
    assert max(sizes) == 32 * 64


def test_types_may_differ() -> None:
    layer = _adapted(nn.Linear(7, 5, dtype=torch.bfloat16), rank=2, num_experts=3, top_k=2)
    layer.lora_shape.float()
    out = layer(torch.randn(4, 7, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16


def test_one_expert_merges_and_more_do_not() -> None:
    layer = _layer(1, 1)
    x = torch.randn(4, 7, dtype=torch.float64)
    before, weight = layer(x), layer.base_layer.weight.clone()
    layer.merge()
    assert torch.allclose(layer(x), before)
    layer.unmerge()
    assert torch.allclose(layer.base_layer.weight, weight)
    with pytest.raises(ValueError, match="gate that depends"):
        _layer(2, 1).merge()
