"""Products with a layer's experts and their low-rank terms, forward and backward, a few experts at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apportion.adapters.cpu_product import multiply
from apportion.adapters.factors import ExpertFactors, SparseFactor, scattered
from apportion.adapters.routed_rows import Chunk, SortedRows


@dataclass
class Kept:
    """What a forward pass keeps for the backward pass.

    Args:
        entered: What enters the activation, by parameter.
        codes: x Aᵀ of every term, the rows of its planned experts one under the other.
        masks: Where dropout leaves a parameter's inputs, by parameter.
    """

    entered: dict[str, Tensor]
    codes: list[Tensor]
    masks: dict[str, Tensor]

    @classmethod
    def room_for(cls, run: SortedRows, hidden: Tensor, factors: Sequence[Any]) -> Kept:
        """Make room, and draw the masks."""
        entered = {name: hidden.new_empty(run.room, run.matrices[name].shape[1]) for name in run.form.entering}
        codes = []
        for (_, term), a in zip(run.terms, factors[::3], strict=True):
            num_rows = sum(run.sizes[expert] for expert in run.present if expert in term.planned.places)
            codes.append(a.new_empty(num_rows, max(term.planned.ranks)))
        return cls(entered, codes, run.draw_masks())

    def tensors(self) -> list[Tensor]:
        """Give everything as a list, as `of` takes it."""
        return [*self.entered.values(), *self.codes, *self.masks.values()]

    @classmethod
    def of(cls, run: SortedRows, tensors: Sequence[Tensor]) -> Kept:
        """Sort a list again."""
        left = iter(tensors)
        entered = {name: next(left) for name in run.form.entering}
        codes = [next(left) for _ in run.terms]
        return cls(entered, codes, {name: next(left) for name in run.masked})


@dataclass
class Gradients:
    """The gradients that a backward pass fills in; those of factors are None where nobody needs them."""

    rows: Tensor | None
    weights: Tensor
    a: list[Tensor | None]
    b: list[Tensor | None]

    @classmethod
    def room_for(
        cls, run: SortedRows, hidden: Tensor, factors: Sequence[Any], needs: Sequence[bool], *, needs_hidden: bool
    ) -> Gradients:
        """Make room."""
        rows = hidden.new_empty(run.room, hidden.shape[1]) if needs_hidden else None
        shapes = [
            (sum(term.planned.ranks), len(range(run.matrices[name].shape[1])[term.columns])) for name, term in run.terms
        ]
        return cls(
            rows=rows,
            weights=hidden.new_empty(run.room),
            a=[torch.zeros_like(a) if needed else None for a, needed in zip(factors[::3], needs[::3], strict=True)],
            b=[
                b.new_zeros(shape) if needed else None
                for b, shape, needed in zip(factors[1::3], shapes, needs[1::3], strict=True)
            ],
        )

    def of_inputs(self, run: SortedRows, weights: Tensor, factors: Sequence[Any]) -> list[Tensor | None]:
        """Give the gradients of tokens, weights and factors, in this order."""
        hidden = None if self.rows is None else run.sum_over_experts(self.rows, None)
        grads: list[Tensor | None] = [hidden, run.by_slot(self.weights).to(weights.dtype)]
        for (_, term), a, b, indices in zip(run.terms, self.a, self.b, factors[2::3], strict=True):
            for grad in (a, b):
                if grad is not None:
                    grad.mul_(term.planned.scale(grad))
            kept = b if b is None or indices is None else b.view(-1).index_select(0, indices.long())
            grads += [a, kept, None]
        return grads


@dataclass(frozen=True)
class _Cut:
    """A term's factors, cut into its experts'; codes where a backward pass follows."""

    number: int
    planned: ExpertFactors
    columns: slice
    a: dict[int, Tensor]
    b: dict[int, Tensor]
    codes: dict[int, Tensor] | None


class _Direction:
    """What both directions of a pass have: matrices and factors cut into the experts' own.

    Args:
        run: The pass.
        factors: A, B or its values, and its indices of every term.
        kept: What the backward pass needs; None where there is none.
    """

    matrices: dict[str, dict[int, Tensor]]

    def __init__(self, run: SortedRows, factors: Sequence[Any], kept: Kept | None) -> None:
        self.run = run
        self.masks = run.draw_masks() if kept is None else kept.masks
        self.terms: dict[str, list[_Cut]] = {name: [] for name in run.matrices}
        triples = zip(factors[::3], factors[1::3], factors[2::3], strict=True)
        for number, ((name, term), (a, b, indices)) in enumerate(zip(run.terms, triples, strict=True)):
            dense, planned = b, term.planned
            if indices is not None and isinstance(term.b_RO, SparseFactor):
                dense = scattered(b, indices, term.b_RO.shape)  # for as long as this lives
            present = [expert for expert in run.present if expert in planned.places]
            own_a, codes = planned.by_expert(a, present), None
            if kept is not None:
                rows = torch.split_with_sizes(kept.codes[number], [run.sizes[expert] for expert in present])
                codes = {e: code[:, : own_a[e].shape[0]] for e, code in zip(present, rows, strict=True)}
            own_b = planned.by_expert(dense, present)
            self.terms[name].append(_Cut(number, planned, term.columns, own_a, own_b, codes))
        self.planned = {name: {expert for term in terms for expert in term.a} for name, terms in self.terms.items()}

    def plans_none(self, names: Iterable[str], chunk: Chunk) -> bool:
        """Tell whether no term of these parameters stands on an expert of a chunk."""
        return all(self.planned[name].isdisjoint(chunk.experts) for name in names)

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
        if self.planned[name].isdisjoint(chunk.experts):
            return
        x = self.dropped(name, x, chunk)
        for term in self.terms[name]:
            for expert, rows, target in zip(chunk.experts, chunk.cut(x), chunk.cut(out[:, term.columns]), strict=True):
                if expert not in term.a:
                    continue
                a, b, scale = term.a[expert], term.b[expert], term.planned.scale_of[expert]
                if a.dtype != target.dtype:  # where nothing is kept
                    target.add_(torch.mm(torch.mm(rows.to(a.dtype), a.t()), b), alpha=scale)
                    continue
                code = torch.mm(rows, a.t(), out=None if term.codes is None else term.codes[expert])
                target.addmm_(code, b, alpha=scale)


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
        self.grad_a = [
            None if grad is None else term.planned.by_expert(grad)
            for (_, term), grad in zip(run.terms, grads.a, strict=True)
        ]
        self.grad_b = [
            None if grad is None else term.planned.by_expert(grad)
            for (_, term), grad in zip(run.terms, grads.b, strict=True)
        ]

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

        The inputs may be missing where no term stands on any of the chunk's experts. Where the rows' weights are
        given, the gradient is that before weighting: so it leaves by `out`, and the factors' gradients are weighted.
        """
        if out is not None:
            self._leave(name, grad, chunk, out, add=add)
        if x is None or self.planned[name].isdisjoint(chunk.experts):
            return
        mask = self.masks.get(name)
        sources = chunk.cut(self.dropped(name, x, chunk))
        own_grads = chunk.cut(grad)
        own_w = None if weights is None else chunk.cut(weights.to(grad.dtype))
        targets = None if out is None else chunk.cut(out)
        masks = None if mask is None else chunk.cut(mask[chunk.window])
        for term in self.terms[name]:
            grad_a, grad_b = self.grad_a[term.number], self.grad_b[term.number]
            for place, expert in enumerate(chunk.experts):
                if expert not in term.a or term.codes is None:
                    continue
                own = own_grads[place][:, term.columns]
                code, grad_code = term.codes[expert], torch.mm(own, term.b[expert].t())
                scale = term.planned.scale_of[expert]
                if targets is not None and masks is None:
                    targets[place].addmm_(grad_code, term.a[expert], alpha=scale)
                elif targets is not None and masks is not None:
                    back = torch.mm(grad_code, term.a[expert]).mul_(masks[place])
                    targets[place].add_(back, alpha=scale / (1 - self.run.routed.dropout))
                if own_w is not None:
                    code, grad_code = code * own_w[place], grad_code.mul_(own_w[place])
                if grad_b is not None:
                    torch.mm(code.t(), own, out=grad_b[expert])
                if grad_a is not None:
                    torch.mm(grad_code.t(), sources[place], out=grad_a[expert])

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
