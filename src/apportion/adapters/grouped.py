"""Products of rows that are sorted by group: one matrix a group, no work for a group without rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Shapes: S rows sorted by group, G groups, I inner width, O outer width, R rank.

_ALIGNMENT_BYTES = 16


def grouped_linear(x_SI: Tensor, weight_GOI: Tensor, sizes_G: Tensor, *, transposed: bool = False) -> Tensor:
    """Multiply each group's rows by the group's own matrix.

    Args:
        x_SI: Rows, those of group 0 first; shape (S, I).
        weight_GOI: Matrices, shape (G, O, I), or (G, I, O) where `transposed`.
        sizes_G: Rows of each group, int64, shape (G,), summing to S.
        transposed: Whether the matrices are stored as (G, I, O).

    Returns:
        Shape (S, O).

    Cost: 2 S I O operations. On CUDA one grouped product without a wait for the device, where the strides are
        multiples of 16 bytes; elsewhere one product a group that has rows.
    """
    if x_SI.is_cuda and _is_aligned(x_SI, weight_GOI):
        return grouped_product(x_SI, weight_GOI if transposed else weight_GOI.transpose(1, 2), sizes_G)
    parts = []
    for group, rows in enumerate(torch.split(x_SI, sizes_G.tolist())):
        if len(rows):
            matrix = weight_GOI[group]
            parts.append(functional.linear(rows, matrix.t() if transposed else matrix))
    if not parts:
        return x_SI.new_zeros(0, weight_GOI.shape[2 if transposed else 1])
    return torch.cat(parts)


def grouped_product(x_SI: Tensor, weight_GIO: Tensor, sizes_G: Tensor) -> Tensor:
    """Multiply each group's rows by the group's own matrix, in one call of PyTorch's grouped product.

    Args:
        x_SI: Rows, those of group 0 first; shape (S, I).
        weight_GIO: Matrices, shape (G, I, O).
        sizes_G: Rows of each group, shape (G,).

    Returns:
        Shape (S, O).
    """
    return functional.grouped_mm(x_SI, weight_GIO, offs=sizes_G.cumsum(0).to(torch.int32))


def grouped_low_rank(x_SI: Tensor, a_RI: Tensor, b_RO: Tensor, ranks: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Apply each group's own low-rank factors to its rows.

    Args:
        x_SI: Rows, those of group 0 first; shape (S, I).
        a_RI: Every group's A, one under the other; shape (sum of ranks, I).
        b_RO: Every group's B transposed, one under the other; shape (sum of ranks, O).
        ranks: Rank of each group.
        sizes: Rows of each group, summing to S.

    Returns:
        (x Aᵀ) Bᵀ of each group; shape (S, O).

    Cost: 2 S R (I + O) operations; the products A·B are never formed.
    """
    groups = zip(
        torch.split(x_SI, list(sizes)), torch.split(a_RI, list(ranks)), torch.split(b_RO, list(ranks)), strict=True
    )
    parts = [functional.linear(functional.linear(x, a), b.t()) for x, a, b in groups if len(x)]
    return torch.cat(parts) if parts else x_SI.new_zeros(0, b_RO.shape[1])


def reorder_rows(x_NI: Tensor, order_S: Tensor, place_S: Tensor, copies: int = 1) -> Tensor:
    """Take rows in another order, each of them `copies` times; the backward pass is a gather too.

    Indexing would scatter gradients row by row, slowly and, where rows come twice, in no fixed order.

    Args:
        x_NI: Rows, shape (N, I).
        order_S: A permutation of N times `copies` slots, `copies` slots a row, int64, shape (S,).
        place_S: The inverse permutation, shape (S,).
        copies: How often each row is taken.

    Returns:
        Shape (S, I).
    """
    rows: Tensor = _ReorderRows.apply(x_NI, order_S, place_S, copies)  # type: ignore[no-untyped-call]
    return rows


class _ReorderRows(torch.autograd.Function):
    """A gather whose gradient is the gather by the inverse permutation, summed over a row's copies."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, order_S: Tensor, place_S: Tensor, copies: int) -> Tensor:
        """Gather."""
        ctx.save_for_backward(place_S)
        ctx.copies = copies
        return x_NI.index_select(0, order_S if copies == 1 else order_S // copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Gather back and sum."""
        (place_S,) = ctx.saved_tensors
        grad = grads[0].index_select(0, place_S)
        return grad if ctx.copies == 1 else grad.view(-1, ctx.copies, grad.shape[1]).sum(1), None, None, None


def _is_aligned(*tensors: Tensor) -> bool:
    """Tell whether PyTorch's grouped product takes these strides."""
    return all(
        tensor.dtype == torch.bfloat16
        and tensor.stride(-1) == 1
        and all(stride * tensor.element_size() % _ALIGNMENT_BYTES == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )
