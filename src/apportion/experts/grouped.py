"""Products of rows sorted by group: one matrix per group, no work where there are no rows, no wait for a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Shapes: S rows sorted by group, N rows of which S are copies, G groups, I inner width, O outer width, R rank.

_ALIGNMENT_BYTES = 16


def grouped_linear(x_SI: Tensor, weight_GOI: Tensor, ends_G: Tensor, *, transposed: bool = False) -> Tensor:
    """Multiply each group's rows by the group's own matrix.

    Args:
        x_SI: Rows, those of group 0 first; shape (S, I).
        weight_GOI: Matrices, shape (G, O, I), or (G, I, O) where `transposed`.
        ends_G: Where each group's rows end, int32, shape (G,).
        transposed: Whether the matrices are stored as (G, I, O).

    Returns:
        Shape (S, O); rows behind the last group's are not defined.

    Cost: 2 S I O operations. In bfloat16 on CUDA one grouped product without a wait for the device, where the strides
        are multiples of 16 bytes; elsewhere one product per group that has rows. Only what needs a gradient gets one.
    """
    weight_GIO = weight_GOI if transposed else weight_GOI.transpose(1, 2)
    x_SI = x_SI.to(weight_GIO.dtype)
    if x_SI.is_cuda and _is_aligned(x_SI, weight_GIO):
        return functional.grouped_mm(x_SI, weight_GIO, offs=ends_G)
    out: Tensor = torch.ops.apportion.grouped_mm(x_SI, weight_GIO, ends_G)
    return out


def grouped_low_rank(x_SI: Tensor, a_GRI: Tensor, b_GRO: Tensor, ends_G: Tensor) -> Tensor:
    """Apply each group's own low-rank factors to its rows.

    Args:
        x_SI: Rows, those of group 0 first; shape (S, I).
        a_GRI: Every group's A.
        b_GRO: Every group's B transposed.
        ends_G: Where each group's rows end, int32, shape (G,).

    Returns:
        (x Aᵀ) Bᵀ of each group; shape (S, O); rows behind the last group's are not defined.

    Cost: 2 S R (I + O) operations; the products A·B are never formed.
    """
    return grouped_linear(grouped_linear(x_SI, a_GRI, ends_G), b_GRO, ends_G, transposed=True)


def reorder_rows(x_NI: Tensor, order_S: Tensor, place_S: Tensor, copies: int = 1) -> Tensor:
    """Take rows in another order, each of them `copies` times; the backward pass is a gather too.

    Indexing would scatter gradients row by row, slowly and, where rows come twice, in no fixed order.

    Args:
        x_NI: Rows, shape (N, I).
        order_S: A permutation of N times `copies` slots, `copies` slots per row, int64, shape (S,).
        place_S: The inverse permutation, shape (S,).
        copies: How often each row is taken.

    Returns:
        Shape (S, I).
    """
    rows: Tensor = _ReorderRows.apply(x_NI, order_S, place_S, copies)  # type: ignore[no-untyped-call]
    return rows


def inverse_order(order_S: Tensor) -> Tensor:
    """Return the inverse of a permutation, shape (S,)."""
    return torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))


class _ReorderRows(torch.autograd.Function):
    """A gather whose gradient is the gather by the inverse permutation, summed over a row's copies."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, order_S: Tensor, place_S: Tensor, copies: int) -> Tensor:
        """Gather."""
        ctx.save_for_backward(place_S)
        ctx.copies = copies
        return x_NI.index_select(0, order_S if copies == 1 else order_S // copies)

    @staticmethod
    def backward(ctx: Any, *grads_SI: Tensor) -> tuple[Tensor, None, None, None]:
        """Gather back and sum."""
        (place_S,) = ctx.saved_tensors
        grad_SI = grads_SI[0].index_select(0, place_S)
        grad_NI = grad_SI if ctx.copies == 1 else grad_SI.view(-1, ctx.copies, grad_SI.shape[1]).sum(1)
        return grad_NI, None, None, None


def _is_aligned(*tensors: Tensor) -> bool:
    """Return whether PyTorch's grouped product takes these matrices, row by row or column by column."""
    return all(
        tensor.dtype == torch.bfloat16
        and 1 in tensor.stride()[-2:]
        and all(stride == 1 or stride * tensor.element_size() % _ALIGNMENT_BYTES == 0 for stride in tensor.stride())
        for tensor in tensors
    )


# An operator of our own, so that `torch.compile` takes the loop whole and a frozen weight's gradient is never formed.


@torch.library.custom_op("apportion::grouped_mm", mutates_args=())
def _grouped_mm(x_SI: Tensor, weight_GIO: Tensor, ends_G: Tensor) -> Tensor:
    """Multiply group by group."""
    out_SO = x_SI.new_zeros(len(x_SI), weight_GIO.shape[2])
    for group, rows in _groups(ends_G):
        torch.mm(x_SI[rows], weight_GIO[group], out=out_SO[rows])
    return out_SO


@torch.library.custom_op("apportion::grouped_outer", mutates_args=())
def _grouped_outer(x_SI: Tensor, grad_SO: Tensor, ends_G: Tensor) -> Tensor:
    """Return every group's xᵀ · grad."""
    out_GIO = x_SI.new_zeros(len(ends_G), x_SI.shape[1], grad_SO.shape[1])
    for group, rows in _groups(ends_G):
        torch.mm(x_SI[rows].t(), grad_SO[rows], out=out_GIO[group])
    return out_GIO


def _groups(ends_G: Tensor) -> Iterator[tuple[int, slice]]:
    """Go through the groups that have rows; on CUDA this waits for the device."""
    for group, (first, last) in enumerate(itertools.pairwise([0, *ends_G.tolist()])):
        if last > first:
            yield group, slice(first, last)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001 - PyTorch's names
    """Save what the gradients need."""
    x_SI, weight_GIO, ends_G = inputs
    ctx.save_for_backward(x_SI if ctx.needs_input_grad[1] else None, weight_GIO, ends_G)


def _backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """Return the gradients that are needed."""
    x_SI, weight_GIO, ends_G = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    grad_SO = grad_SO.contiguous()
    grad_x_SI = torch.ops.apportion.grouped_mm(grad_SO, weight_GIO.transpose(1, 2), ends_G) if needs_x else None
    grad_weight_GIO = torch.ops.apportion.grouped_outer(x_SI, grad_SO, ends_G) if needs_weight else None
    return grad_x_SI, grad_weight_GIO, None


_grouped_mm.register_fake(lambda x_SI, weight_GIO, _: x_SI.new_empty(len(x_SI), weight_GIO.shape[2]))
_grouped_outer.register_fake(lambda x_SI, grad_SO, ends_G: x_SI.new_empty(len(ends_G), x_SI.shape[1], grad_SO.shape[1]))
_grouped_mm.register_autograd(_backward, setup_context=_save)
