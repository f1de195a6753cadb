"""Products of rows that are sorted by group: one matrix a group, no work where there are no rows, no wait for a GPU."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Shapes: S rows sorted by group, G groups, I inner width, O outer width, R rank.

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
        are multiples of 16 bytes; elsewhere one product a group that has rows. Only what needs a gradient gets one.
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


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Give numbers that never change as a tensor; it is copied to a device once.

    Args:
        values: The numbers, whole or not.
        device: Where they are needed.

    Returns:
        Shape (len(values),).
    """
    made: Tensor = torch.tensor(values, device=device) if torch.compiler.is_compiling() else _constant(values, device)
    return made


@functools.lru_cache(maxsize=4096)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Make a constant that is kept."""
    with torch.inference_mode(mode=False):
        return torch.tensor(values, device=device)


def _is_aligned(*tensors: Tensor) -> bool:
    """Tell whether PyTorch's grouped product takes these matrices, row by row or column by column."""
    return all(
        tensor.dtype == torch.bfloat16
        and 1 in tensor.stride()[-2:]
        and all(stride == 1 or stride * tensor.element_size() % _ALIGNMENT_BYTES == 0 for stride in tensor.stride())
        for tensor in tensors
    )


# An operator of our own, so that `torch.compile` takes the loop whole and a frozen weight's gradient is never formed.


@torch.library.custom_op("apportion::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply group by group."""
    out = x.new_zeros(len(x), weight.shape[2])
    for group, rows in _groups(ends):
        torch.mm(x[rows], weight[group], out=out[rows])
    return out


@torch.library.custom_op("apportion::grouped_outer", mutates_args=())
def _grouped_outer(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """Give every group's xᵀ · grad."""
    out = x.new_zeros(len(ends), x.shape[1], grad.shape[1])
    for group, rows in _groups(ends):
        torch.mm(x[rows].t(), grad[rows], out=out[group])
    return out


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Give the groups that have rows, and their rows; on CUDA this waits for the device."""
    for group, (first, last) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        if last > first:
            yield group, slice(first, last)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001 - PyTorch's names
    """Keep what the gradients need."""
    x, weight, ends = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, ends)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """Give the gradients that are needed."""
    x, weight, ends = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    grad = grad.contiguous()
    grad_x = torch.ops.apportion.grouped_mm(grad, weight.transpose(1, 2), ends) if needs_x else None
    return grad_x, torch.ops.apportion.grouped_outer(x, grad, ends) if needs_weight else None, None


_grouped_mm.register_fake(lambda x, weight, _: x.new_empty(len(x), weight.shape[2]))
_grouped_outer.register_fake(lambda x, grad, ends: x.new_empty(len(ends), x.shape[1], grad.shape[1]))
_grouped_mm.register_autograd(_backward, setup_context=_save)
