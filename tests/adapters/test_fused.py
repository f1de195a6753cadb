"""The fused grouped product: equal to small operations, forward and backward."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apportion.adapters.fused import LowRankTerm, grouped_lora_linear


def _composed(x: Tensor, weight: Tensor, sizes: list[int], terms: list[LowRankTerm], dropped: Tensor | None) -> Tensor:
    """Multiply expert by expert with operations that autograd knows."""
    source = x if dropped is None else dropped
    parts = [rows @ matrix.t() for rows, matrix in zip(x.split(sizes), weight, strict=True)]
    for term in terms:
        factors = zip(term.a_RI.split(list(term.ranks)), term.b_RO.split(list(term.ranks)), strict=True)
        for expert, scale, (a, b) in zip(term.experts, term.scales, factors, strict=True):
            delta = torch.zeros_like(parts[expert])
            delta[:, term.columns] = ((source.split(sizes)[expert].to(a.dtype) @ a.t()) @ b * scale).to(x.dtype)
            parts[expert] = parts[expert] + delta
    return torch.cat(parts)


@given(
    sizes=st.lists(st.integers(0, 5), min_size=2, max_size=6),
    data=st.data(),
    transposed=st.booleans(),
    apart=st.booleans(),
    columns=st.sampled_from([[slice(None)], [slice(0, 4), slice(4, None)], [slice(0, None, 2), slice(1, None, 2)]]),
)
def test_equals_small_operations(
    sizes: list[int], data: st.DataObject, transposed: bool, apart: bool, columns: list[slice]
) -> None:
    torch.manual_seed(sum(sizes))
    terms = []
    for part in columns:
        experts = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1)))
        ranks = tuple(data.draw(st.integers(1, 3)) for _ in experts)
        width = len(range(8)[part])
        a = torch.randn(sum(ranks), 7, dtype=torch.float64, requires_grad=True)
        b = torch.randn(sum(ranks), width, dtype=torch.float64, requires_grad=data.draw(st.booleans()))
        scales = tuple(float(rank) for rank in ranks)
        terms.append(LowRankTerm(a, b, tuple(experts), ranks, scales, part))
    x = torch.randn(sum(sizes), 7, dtype=torch.float64, requires_grad=True)
    dropped = torch.randn_like(x, requires_grad=True) if apart else None
    weight = torch.randn(len(sizes), 8, 7, dtype=torch.float64)
    stored = weight.transpose(1, 2).contiguous() if transposed else weight
    found = grouped_lora_linear(x, stored, sizes, terms, transposed=transposed, dropped_SI=dropped)
    expected = _composed(x, weight, sizes, terms, dropped)
    assert torch.allclose(found, expected)
    inputs = [x, *([dropped] if dropped is not None else [])]
    inputs += [factor for term in terms for factor in (term.a_RI, term.b_RO) if factor.requires_grad]
    direction = torch.randn_like(found)
    own = torch.autograd.grad((found * direction).sum(), inputs)
    plain = torch.autograd.grad((expected * direction).sum(), inputs, allow_unused=True)
    for one, other in zip(own, plain, strict=True):
        assert torch.allclose(one, torch.zeros_like(one) if other is None else other)


def test_rows_in_bfloat16_meet_factors_in_float32() -> None:
    sizes = [3, 0, 4]
    x = torch.randn(7, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(3, 8, 16, dtype=torch.bfloat16)
    a, b = torch.randn(4, 16, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    term = LowRankTerm(a, b, (0, 2), (2, 2), (1.0, 0.5), slice(None))
    found = grouped_lora_linear(x, weight, sizes, [term])
    expected = _composed(x, weight, sizes, [term], None)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), atol=0.2, rtol=0.05)
    own = torch.autograd.grad(found.float().sum(), [x, a, b])
    plain = torch.autograd.grad(expected.float().sum(), [x, a, b])
    for one, other in zip(own, plain, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one.float(), other.float(), atol=0.3, rtol=0.05)
