"""Products of sorted rows with packed matrices, which are dequantised when their rows run, and never kept.

The backward pass dequantises them again: what autograd saved would be the whole model in full.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from apportion.experts.grouped import grouped_linear
from apportion.experts.weights import StackedWeight, chunks

# Shapes: S rows sorted by expert, E experts, n of them that are dequantised together, I and O inner and outer width.

BUDGET_BYTES = 1 << 29  # of the matrices that are dequantised together


@torch.compiler.disable  # type: ignore[untyped-decorator]
def dequantised_linear(x_SI: Tensor, weight: StackedWeight, ends_E: Tensor, *, transposed: bool = False) -> Tensor:
    """Multiply each expert's rows by the expert's own frozen matrix.

    Args:
        x_SI: Rows sorted by expert.
        weight: Packed matrices, (E, O, I), or (E, I, O) where `transposed`.
        ends_E: Where each expert's rows end, int32.
        transposed: Whether the matrices are stored as (E, I, O).

    Returns:
        Shape (S, O), in the matrices' type before they were packed.

    Cost: the product, and dequantising the experts that have rows, once forward and once backward; memory of
        `BUDGET_BYTES`, or of one expert. On a GPU one wait for the device in each direction.
    """
    out_SO: Tensor = _DequantisedLinear.apply(x_SI.to(weight.dtype), weight, ends_E, transposed)  # type: ignore[no-untyped-call]
    return out_SO


class _DequantisedLinear(torch.autograd.Function):
    """The product with matrices that need no gradient; only where the experts' rows end is saved."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, weight: StackedWeight, ends_E: Tensor, transposed: bool) -> Tensor:  # noqa: FBT001
        """Multiply."""
        ctx.save_for_backward(ends_E)
        ctx.weight, ctx.transposed = weight, transposed
        return _in_parts(x_SI, weight, ends_E, transposed=transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor, None, None, None]:
        """Multiply by the matrices turned, which are dequantised again."""
        (ends_E,) = ctx.saved_tensors
        return _in_parts(grad_SO, ctx.weight, ends_E, transposed=not ctx.transposed), None, None, None


@torch.no_grad()
def _in_parts(x_SI: Tensor, weight: StackedWeight, ends_E: Tensor, *, transposed: bool) -> Tensor:
    """Multiply by the matrices of a few experts at a time."""
    _, rows, columns = weight.shape
    ends = [0, *ends_E.tolist()]
    present = [expert for expert, (first, last) in enumerate(itertools.pairwise(ends)) if last > first]
    out_SO = x_SI.new_zeros(len(x_SI), columns if transposed else rows)
    for experts in chunks(present, rows * columns * weight.dtype.itemsize, BUDGET_BYTES):
        start = ends[experts[0]]
        part = slice(start, ends[experts[-1] + 1])
        ends_n = torch.tensor([ends[expert + 1] - start for expert in experts], dtype=torch.int32, device=x_SI.device)
        dense_nOI = weight.dense(experts, weight.dtype)
        out_SO[part] = grouped_linear(x_SI[part], dense_nOI, ends_n, transposed=transposed)
    return out_SO
