"""A grouped product with low-rank terms as one step of autograd: what a CPU runs fastest.

Composed of small operations, LoRA on 64 experts is a thousand nodes a layer, whose bookkeeping and temporaries cost
more than their arithmetic. Here every product writes where its result belongs, and the backward pass is written out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from apportion.adapters.factors import SparseFactor, scattered

# Shapes: S rows sorted by expert, E experts, I and O input and output width, R summed rank of a term's experts.


_FACTORS = 6  # where the factors begin among the arguments of `_GroupedLora.forward`


@dataclass(frozen=True)
class LowRankTerm:
    """LoRA on some experts of one projection.

    Args:
        a_RI: The experts' A, one under the other.
        b_RO: The experts' B transposed, one under the other; dense, or sparse.
        experts: The experts' ids, in rising order.
        ranks: Rank of each.
        scales: alpha / rank of each.
        columns: The projection's part of the output.
    """

    a_RI: Tensor
    b_RO: Tensor | SparseFactor
    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    columns: slice


@dataclass(frozen=True)
class _Spec:
    """What of a term is no tensor: its columns, and of each planned expert with rows the rows, the ranks, the scale."""

    columns: slice
    parts: tuple[tuple[slice, slice, float], ...]
    shape: tuple[int, int] | None  # of a sparse B

    def dense(self, b: Tensor, indices: Tensor | None) -> Tensor:
        """Give B, made from its kept values where it is sparse."""
        return b if indices is None or self.shape is None else scattered(b, indices, self.shape)

    @classmethod
    def of(cls, term: LowRankTerm, ends: Sequence[int]) -> _Spec:
        """Find a term's rows."""
        parts, start = [], 0
        for expert, rank, scale in zip(term.experts, term.ranks, term.scales, strict=True):
            if ends[expert + 1] > ends[expert]:
                parts.append((slice(ends[expert], ends[expert + 1]), slice(start, start + rank), scale))
            start += rank
        return cls(term.columns, tuple(parts), term.b_RO.shape if isinstance(term.b_RO, SparseFactor) else None)


def grouped_lora_linear(
    x_SI: Tensor,
    weight_EOI: Tensor,
    sizes: Sequence[int],
    terms: Sequence[LowRankTerm],
    *,
    transposed: bool = False,
    dropped_SI: Tensor | None = None,
) -> Tensor:
    """Multiply each expert's rows by its matrix, and add its low-rank terms.

    Args:
        x_SI: Rows, those of expert 0 first; shape (S, I).
        weight_EOI: The experts' matrices, shape (E, O, I), or (E, I, O) where `transposed`; they get no gradient.
        sizes: Rows of each expert.
        terms: The low-rank terms.
        transposed: Whether the matrices are stored as (E, I, O).
        dropped_SI: What the terms multiply instead of `x_SI`, in training with dropout.

    Returns:
        Shape (S, O), in the rows' type.

    Cost: 2 S I O + 2 n R (I + O) operations for terms on n rows; the backward pass keeps no output and copies no row.
    """
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    specs = [_Spec.of(term, ends) for term in terms]
    factors: list[Tensor | None] = []
    for term in terms:
        b = term.b_RO
        factors += [term.a_RI, b.values, b.indices] if isinstance(b, SparseFactor) else [term.a_RI, b, None]
    out: Tensor = _GroupedLora.apply(x_SI, dropped_SI, weight_EOI, transposed, tuple(ends), specs, *factors)  # type: ignore[no-untyped-call]
    return out


class _GroupedLora(torch.autograd.Function):
    """The product and its backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        transposed: bool,
        ends: tuple[int, ...],
        specs: list[_Spec],
        *factors: Any,
    ) -> Tensor:
        """Run every expert's products into one output."""
        out = x.new_empty(len(x), weight.shape[2 if transposed else 1])
        for expert, (first, last) in enumerate(itertools.pairwise(ends)):
            if last > first:
                matrix = weight[expert] if transposed else weight[expert].t()
                torch.mm(x[first:last], matrix, out=out[first:last])
        source = x if dropped is None else dropped
        codes = []
        for spec, a, own, indices in zip(specs, factors[::3], factors[1::3], factors[2::3], strict=True):
            b = spec.dense(own, indices)
            columns = out[:, spec.columns]
            kept = []
            for rows, ranks, scale in spec.parts:
                code = source[rows].to(a.dtype) @ a[ranks].t()
                kept.append(code)
                if out.dtype == b.dtype:
                    columns[rows].addmm_(code, b[ranks], alpha=scale)
                else:
                    columns[rows] += (code @ b[ranks]).mul_(scale).to(out.dtype)
            codes.append(kept)
        ctx.save_for_backward(source, weight, *factors, *(code for kept in codes for code in kept))
        ctx.transposed, ctx.ends, ctx.specs, ctx.apart = transposed, ends, specs, dropped is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Give the gradients of rows and factors."""
        source, weight, *saved = ctx.saved_tensors
        num_factors = 3 * len(ctx.specs)
        factors, codes = saved[:num_factors], iter(saved[num_factors:])
        grad = grad.contiguous()
        grad_x = grad_source = None
        if ctx.needs_input_grad[0]:
            grad_x = source.new_empty(source.shape)
            for expert, (first, last) in enumerate(itertools.pairwise(ctx.ends)):
                if last > first:
                    matrix = weight[expert].t() if ctx.transposed else weight[expert]
                    torch.mm(grad[first:last], matrix, out=grad_x[first:last])
        needed = ctx.needs_input_grad[1 if ctx.apart else 0]
        if needed:
            grad_source = torch.zeros_like(source) if ctx.apart else grad_x
        grads: list[Tensor | None] = []
        for number, spec in enumerate(ctx.specs):
            a, values, indices = factors[3 * number : 3 * number + 3]
            b = spec.dense(values, indices)
            needs_a, needs_b, _ = ctx.needs_input_grad[_FACTORS + 3 * number : _FACTORS + 3 * number + 3]
            grad_a = torch.zeros_like(a) if needs_a else None
            grad_b = torch.zeros_like(b) if needs_b else None
            columns = grad[:, spec.columns]
            for rows, ranks, scale in spec.parts:
                code, own = next(codes), columns[rows].to(b.dtype)
                grad_code = (own @ b[ranks].t()).mul_(scale)
                if grad_b is not None:
                    torch.mm(code.t(), own, out=grad_b[ranks]).mul_(scale)
                if grad_a is not None:
                    torch.mm(grad_code.t(), source[rows].to(a.dtype), out=grad_a[ranks])
                if grad_source is not None and grad_source.dtype == a.dtype:
                    grad_source[rows].addmm_(grad_code, a[ranks])
                elif grad_source is not None:
                    grad_source[rows] += (grad_code @ a[ranks]).to(grad_source.dtype)
            if grad_b is not None and indices is not None:
                grad_b = grad_b.view(-1).index_select(0, indices.long())
            grads += [grad_a, grad_b, None]
        return grad_x, grad_source if ctx.apart else None, None, None, None, None, *grads
