"""Sparse and frozen factors: equal to dense masked ones, and only what is kept is ever held."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from apportion.adapters.factors import FrozenFactor, SparseFactor

CPU = torch.device("cpu")


@given(rows=st.integers(1, 9), columns=st.integers(1, 7), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_equals_a_dense_masked_matrix(rows: int, columns: int, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    kept = torch.randperm(rows * columns)[: round(share * rows * columns)].sort().values
    sparse = SparseFactor(rows, columns, kept, CPU)
    nn.init.normal_(sparse.values)
    mask = torch.zeros(rows * columns).index_fill(0, kept, 1.0).view(rows, columns)
    dense = nn.Parameter(torch.zeros(rows * columns).index_copy(0, kept, sparse.values.data).view(rows, columns))
    x = torch.randn(5, columns, requires_grad=True)
    direction = torch.randn(5, rows)
    found, expected = sparse(x), nn.functional.linear(x, dense * mask)
    assert torch.allclose(found, expected, atol=1e-6)
    own = torch.autograd.grad((found * direction).sum(), [x, sparse.values])
    reference = torch.autograd.grad((expected * direction).sum(), [x, dense])
    assert torch.allclose(own[0], reference[0], atol=1e-6)
    assert torch.allclose(own[1], reference[1].reshape(-1)[kept], atol=1e-6)


def test_the_dense_matrix_is_not_kept_for_the_backward_pass() -> None:
    sparse = SparseFactor(300, 200, torch.arange(0, 60_000, 100), CPU)
    nn.init.normal_(sparse.values)
    held: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = sparse(torch.randn(4, 200, requires_grad=True))
    assert sorted(held) == [600, 600, 800]  # values, indices, rows
    out.sum().backward()
    assert sparse.values.grad is not None


def test_other_entries_can_be_kept() -> None:
    sparse = SparseFactor(3, 2, torch.tensor([0, 5]), CPU)
    sparse.keep(torch.tensor([1, 2, 3]))
    with torch.no_grad():
        sparse.values.fill_(2.0)
    assert sparse.weight.tolist() == [[0, 2], [2, 2], [0, 0]]
    before = sparse.values
    sparse.keep(torch.tensor([0, 1, 2]))
    assert sparse.values is before  # an optimizer may know it
    assert not sparse.weight.any()


@pytest.mark.parametrize("stored", [False, True])
def test_a_frozen_factor_is_no_parameter(stored: bool) -> None:
    frozen = FrozenFactor(2, 3, CPU, stored=stored)
    frozen.requires_grad_(True)
    assert not list(frozen.parameters())
    assert ("weight" in frozen.state_dict()) == stored
