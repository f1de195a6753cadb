"""The fused kernel: rows that fill blocks, dropout, half precision."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from adapted_experts import adapted_experts, gradients_of, routed_inputs, run_merged, stack_of


def test_what_fills_a_block_touches_nothing() -> None:
    """A token too large for an expert that it is not routed to must not reach that expert's gradients."""
    layer = adapted_experts("olmoe", torch.float32, every=True)
    hidden, _, weights = routed_inputs(layer, tokens=6, dtype=torch.float32)
    ids = torch.tensor([[1, 2]] + [[3, 4]] * 5)
    with torch.no_grad():
        hidden[0] = float("inf")
    stack = stack_of(layer)
    for side, parameters in (("A", stack.lora_A), ("B", stack.lora_B)):
        for name, planned in stack.planned.items():
            grad = gradients_of(layer(hidden, ids, weights)[1:], [parameters[name]])[0]
            assert planned.by_expert(grad)[3].isfinite().all(), (side, name)


def test_dropout_leaves_the_experts_alone_and_has_right_gradients() -> None:
    layer = adapted_experts("olmoe", dropout=0.5)
    hidden, ids, weights = routed_inputs(layer, tokens=5)
    factors = [*layer.lora_shape.parameters()]

    def run(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same mask
        output: Tensor = layer(inputs[0], ids, inputs[1])
        return output

    assert torch.autograd.gradcheck(run, (hidden, weights, *factors))
    torch.manual_seed(4)
    assert not torch.allclose(layer(hidden, ids, weights), run(hidden, weights))
    mean = torch.stack([layer(hidden, ids, weights).detach() for _ in range(3000)]).mean(0)
    stack_of(layer).lora_B.zero_grad()
    with torch.no_grad():
        for parameter in stack_of(layer).lora_B.parameters():
            parameter.zero_()
    zeros = torch.zeros_like(hidden)
    assert torch.allclose(layer(hidden, ids, weights), run_merged(layer, hidden, ids, weights))
    assert torch.equal(layer(zeros, ids, weights), zeros)
    assert mean.isfinite().all()


def test_bfloat16_rows_in_blocks_equal_float32() -> None:
    """Products in half precision run past an expert's rows; what they write there must not stay."""
    exact = adapted_experts("olmoe", torch.float32)
    hidden, ids, weights = routed_inputs(exact, tokens=150, dtype=torch.float32)
    half = copy.deepcopy(exact)
    half.base_layer.to(torch.bfloat16)
    rounded, rounded_w = hidden.detach().bfloat16().requires_grad_(), weights.detach().bfloat16().requires_grad_()
    found, expected = half(rounded, ids, rounded_w), exact(hidden, ids, weights)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected, atol=0.03 * float(expected.detach().abs().max()))
    own = gradients_of(found, [rounded, rounded_w, *half.lora_shape.parameters()])
    plain = gradients_of(expected, [hidden, weights, *exact.lora_shape.parameters()])
    for one, other in zip(own, plain, strict=True):
        assert torch.linalg.vector_norm(one.float() - other) < 0.05 * torch.linalg.vector_norm(other)
