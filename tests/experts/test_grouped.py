"""Grouped products against a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.experts.grouped import grouped_linear, grouped_low_rank, reorder_rows

SIZES = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def _ends(sizes: list[int]) -> torch.Tensor:
    """Tell where groups end."""
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


@given(sizes=SIZES, transposed=st.booleans(), trained=st.booleans())
def test_grouped_linear_is_a_loop(sizes: list[int], transposed: bool, trained: bool) -> None:
    x = torch.randn(sum(sizes), 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(sizes), 5, 7, dtype=torch.float64, requires_grad=trained)
    stored = weight.transpose(1, 2).contiguous() if transposed else weight
    found = grouped_linear(x, stored, _ends(sizes), transposed=transposed)
    expected = torch.cat([part @ matrix.t() for part, matrix in zip(x.split(sizes), weight, strict=True)])
    assert torch.allclose(found, expected)
    direction, inputs = torch.randn_like(expected), [x, weight] if trained else [x]
    own = torch.autograd.grad(found, inputs, direction)
    for one, other in zip(own, torch.autograd.grad(expected, inputs, direction), strict=True):
        assert torch.allclose(one, other)


def test_a_frozen_weight_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    formed = []
    outer = torch.ops.apportion.grouped_outer
    monkeypatch.setattr(torch.ops.apportion, "grouped_outer", lambda *args: formed.append(1) or outer(*args))
    for trained in (False, True):
        x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=trained)
        grouped_linear(x, weight, _ends([1, 3])).sum().backward()
        assert len(formed) == trained


@given(groups=st.lists(st.integers(0, 5), min_size=1, max_size=5), rank=st.integers(1, 4))
def test_grouped_low_rank_is_a_loop(groups: list[int], rank: int) -> None:
    x = torch.randn(sum(groups), 7)
    a, b = torch.randn(len(groups), rank, 7), torch.randn(len(groups), rank, 5)
    found = grouped_low_rank(x, a, b, _ends(groups))
    parts = zip(x.split(groups), a, b, strict=True)
    expected = torch.cat([part_x @ (part_a.t() @ part_b) for part_x, part_a, part_b in parts])
    assert torch.allclose(found, expected, atol=1e-4)


@given(num_rows=st.integers(0, 6), copies=st.integers(1, 3))
def test_reordering_is_indexing(num_rows: int, copies: int) -> None:
    order = torch.randperm(num_rows * copies)
    found_x = torch.randn(num_rows, 4, requires_grad=True)
    expected_x = found_x.detach().clone().requires_grad_()
    found = reorder_rows(found_x, order, order.argsort(), copies)
    expected = expected_x[order // copies]
    direction = torch.randn_like(expected)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    assert torch.equal(found, expected)
    assert torch.allclose(found_x.grad, expected_x.grad, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_of_a_gpu_is_the_same_arithmetic(dtype: torch.dtype) -> None:
    """PyTorch runs the operator that is used on CUDA on the CPU too."""
    ends = _ends([3, 0, 9, 4])
    x = torch.randn(16, 32, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 32, 16, dtype=dtype, requires_grad=True)
    direction = torch.randn(16, 16, dtype=dtype)
    found = torch.nn.functional.grouped_mm(x, weight, offs=ends)
    found_grads = torch.autograd.grad(found, (x, weight), direction)
    expected = grouped_linear(x, weight, ends, transposed=True)
    expected_grads = torch.autograd.grad(expected, (x, weight), direction)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert torch.allclose(found, expected, atol=tolerance, rtol=tolerance)
    for got, wanted in zip(found_grads, expected_grads, strict=True):
        assert torch.allclose(got, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu() -> None:
    ends = _ends([3, 0, 9, 4])
    x, weight = torch.randn(16, 32, dtype=torch.bfloat16), torch.randn(4, 16, 32, dtype=torch.bfloat16)
    found = grouped_linear(x.cuda(), weight.cuda(), ends.cuda())
    assert torch.allclose(found.cpu(), grouped_linear(x, weight, ends), atol=5e-2, rtol=5e-2)
