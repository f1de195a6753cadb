"""Products with a layer's experts and their low-rank terms, forward and backward, a few experts at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apportion.adapters.cpu_product import multiply
from apportion.adapters.factors import SparseFactor, scattered
from apportion.adapters.routed_rows import Chunk, SortedRows


@dataclass
class Kept:
    """What a forward pass keeps for the backward pass.

    Args:
        entered: What enters the activation, by parameter.
        masks: Where dropout leaves a parameter's inputs, by parameter.
        codes: x Aᵀ of a chunk by a term, by the chunk's first row and the term's number.
    """

    entered: dict[str, Tensor]
    masks: dict[str, Tensor]
    codes: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def room_for(cls, run: SortedRows, hidden: Tensor) -> Kept:
        """Make room, and draw the masks."""
        entered = {name: hidden.new_empty(run.room, run.matrices[name].shape[1]) for name in run.form.entering}
        return cls(entered, run.draw_masks())

    def tensors(self) -> list[Tensor]:
        """Give everything as a list, as `of` takes it."""
        return [*self.entered.values(), *self.masks.values(), *self.codes.values()]

    @classmethod
    def of(cls, run: SortedRows, tensors: Sequence[Tensor], codes: Iterable[tuple[int, int]]) -> Kept:
        """Sort a list again, the codes by their keys."""
        left = iter(tensors)
        entered = {name: next(left) for name in run.form.entering}
        masks = {name: next(left) for name in run.masked}
        return cls(entered, masks, {key: next(left) for key in codes})


@dataclass
class Gradients:
    """The gradients that a backward pass fills in; those of factors expert by expert, in the order of the rows.

    Factors whose gradients nobody needs have None.
    """

    rows: Tensor | None
    weights: Tensor
    a: list[Tensor | None]
    b: list[Tensor | None]

    @classmethod
    def room_for(
        cls, run: SortedRows, hidden: Tensor, factors: Sequence[Any], needs: Sequence[bool], *, needs_hidden: bool
    ) -> Gradients:
        """Make room."""
        grads = cls(
            rows=hidden.new_empty(run.room, hidden.shape[1]) if needs_hidden else None,
            weights=hidden.new_empty(run.room),
            a=[],
            b=[],
        )
        for number, (name, term) in enumerate(run.terms):
            a, b = factors[3 * number : 3 * number + 2]
            width = len(range(run.matrices[name].shape[1])[term.columns])
            num_experts, rank = len(run.orders[number]), max(term.planned.ranks)
            grads.a.append(a.new_empty(num_experts, rank, a.shape[1]) if needs[3 * number] else None)
            grads.b.append(b.new_empty(num_experts, rank, width) if needs[3 * number + 1] else None)
        return grads

    def of_inputs(self, run: SortedRows, weights: Tensor, factors: Sequence[Any]) -> list[Tensor | None]:
        """Give the gradients of tokens, weights and factors, in this order."""
        hidden = None if self.rows is None else run.sum_over_experts(self.rows, None)
        grads: list[Tensor | None] = [hidden, run.by_slot(self.weights).to(weights.dtype)]
        for number, (_, term) in enumerate(run.terms):
            order, indices = run.orders[number], factors[3 * number + 2]
            a, b = (
                None
                if own is None
                else term.planned.unpadded(
                    own.new_zeros(len(term.planned.experts), *own.shape[1:]).index_copy_(0, order, own)
                )
                for own in (self.a[number], self.b[number])
            )
            if b is not None:
                b.mul_(term.planned.scale(b))
            kept = b if b is None or indices is None else b.view(-1).index_select(0, indices.long())
            grads += [a, kept, None]
        return grads


class _Direction:
    """What both directions of a pass have: matrices, and the factors of the experts that have rows.

    Args:
        run: The pass.
        factors: A, B or its values, and its indices of every term.
        kept: What the backward pass needs; None where there is none.
    """

    matrices: dict[str, dict[int, Tensor]]

    def __init__(self, run: SortedRows, factors: Sequence[Any], kept: Kept | None) -> None:
        self.run, self.kept = run, kept
        self.masks = run.draw_masks() if kept is None else kept.masks
        self.a: list[Tensor] = []
        self.b: list[Tensor] = []  # times the scale
        triples = zip(factors[::3], factors[1::3], factors[2::3], strict=True)
        for order, (_, term), (a, b, indices) in zip(run.orders, run.terms, triples, strict=True):
            dense, planned = b, term.planned
            if indices is not None and isinstance(term.b_RO, SparseFactor):
                dense = scattered(b, indices, term.b_RO.shape)  # for as long as this lives
            scaled = planned.padded(dense * planned.scale(dense))
            self.a.append(planned.padded(a).index_select(0, order))
            self.b.append(scaled.index_select(0, order))

    def terms(self, name: str, chunk: Chunk) -> list[tuple[int, slice, slice]]:
        """Give the terms of a parameter that stand on a chunk: number, columns and the experts' places."""
        found = ((number, *self.run.terms[number], places) for number, places in chunk.terms.items())
        return [(number, term.columns, places) for number, parameter, term, places in found if parameter == name]

    def dropped(self, name: str, x: Tensor, chunk: Chunk) -> Tensor:
        """Give what the terms of a parameter multiply."""
        mask = self.masks.get(name)
        return x if mask is None else (x * mask[chunk.window]).div_(1 - self.run.routed.dropout)


class Forward(_Direction):
    """Products from inputs to outputs.

    Args:
        run: The pass.
        factors: A, B or its values, and its indices of every term.
        kept: What the backward pass needs; None where there is none.
    """

    def __init__(self, run: SortedRows, factors: Sequence[Any], kept: Kept | None) -> None:
        super().__init__(run, factors, kept)
        turned = {name: matrices.transpose(1, 2) for name, matrices in run.matrices.items()}
        self.matrices = {name: _picked(matrices, run.present) for name, matrices in turned.items()}

    def multiply(self, name: str, x: Tensor, chunk: Chunk, out: Tensor) -> None:
        """Multiply a chunk's rows by one parameter, with its bias and its terms, into `out`."""
        matrices, bias = self.matrices[name], None
        if self.run.form.has_bias:
            bias = getattr(self.run.routed.module, f"{name}_bias")
        for expert, rows, target in zip(chunk.experts, chunk.cut(x), chunk.cut(out), strict=True):
            multiply(rows, matrices[expert], target, None if bias is None else bias[expert])
        terms = self.terms(name, chunk)
        if not terms:
            return
        rows, target = chunk.batch(self.dropped(name, x, chunk)), chunk.batch(out)
        for number, columns, places in terms:
            a, b = self.a[number][places], self.b[number][places]
            if a.dtype != rows.dtype:  # where nothing is kept
                target[..., columns].add_(torch.bmm(torch.bmm(rows.to(a.dtype), a.transpose(1, 2)), b))
                continue
            code = torch.bmm(rows, a.transpose(1, 2))
            target[..., columns].baddbmm_(code, b)
            if self.kept is not None:
                self.kept.codes[chunk.start, number] = code


class Backward(_Direction):
    """Products from the gradients of outputs to those of inputs and factors.

    Args:
        run: The pass.
        factors: A, B or its values, and its indices of every term.
        kept: What the forward pass kept.
        grads: What is to be filled in.
    """

    def __init__(self, run: SortedRows, factors: Sequence[Any], kept: Kept, grads: Gradients) -> None:
        super().__init__(run, factors, kept)
        self.matrices = {name: _picked(matrices, run.present) for name, matrices in run.matrices.items()}
        self.codes, self.grads = kept.codes, grads

    def multiply(
        self,
        name: str,
        grad: Tensor,
        x: Tensor | None,
        chunk: Chunk,
        out: Tensor | None,
        *,
        weights: Tensor | None = None,
        add: bool = False,
    ) -> None:
        """Take a chunk's gradient back through one parameter and its terms, into `out`.

        The inputs may be missing where no term stands on the chunk. Where the rows' weights are given, the gradient is
        that before weighting: so it leaves by `out`, and the factors' gradients are weighted.
        """
        if out is not None:
            self._leave(name, grad, chunk, out, add=add)
        terms = self.terms(name, chunk)
        if x is None or not terms:
            return
        mask = self.masks.get(name)
        rows, grad_out = chunk.batch(self.dropped(name, x, chunk)), chunk.batch(grad)
        target = None if out is None else chunk.batch(out)
        own_w = None if weights is None else chunk.batch(weights.to(grad.dtype))
        for number, columns, places in terms:
            own, a, code = grad_out[..., columns], self.a[number][places], self.codes[chunk.start, number]
            grad_code = torch.bmm(own, self.b[number][places].transpose(1, 2))
            if target is not None and mask is None:
                target.baddbmm_(grad_code, a)
            elif target is not None and mask is not None:
                back = torch.bmm(grad_code, a).mul_(chunk.batch(mask[chunk.window]))
                target.add_(back, alpha=1 / (1 - self.run.routed.dropout))
            if own_w is not None:
                code, grad_code = code * own_w, grad_code.mul_(own_w)
            grad_a, grad_b = self.grads.a[number], self.grads.b[number]
            if grad_b is not None:
                torch.bmm(code.transpose(1, 2), own, out=grad_b[places])
            if grad_a is not None:
                torch.bmm(grad_code.transpose(1, 2), rows, out=grad_a[places])

    def _leave(self, name: str, grad: Tensor, chunk: Chunk, out: Tensor, *, add: bool) -> None:
        """Take a chunk's gradient back through the parameter itself."""
        for expert, rows, target in zip(chunk.experts, chunk.cut(grad), chunk.cut(out), strict=True):
            room = torch.empty_like(target) if add else target
            multiply(rows, self.matrices[name][expert], room)
            if add:
                target.add_(room)


def _picked(matrices: Tensor, experts: list[int]) -> dict[int, Tensor]:
    """Give the experts' matrices: in one call, unless they are few."""
    if 4 * len(experts) > len(matrices):
        return dict(enumerate(matrices.unbind()))
    return {expert: matrices[expert] for expert in experts}
