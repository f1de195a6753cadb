"""What passes autograd's boundary: a layer's factors, what is saved for the backward pass, and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from apportion.adapters.factors import SparseFactor, scattered
from apportion.adapters.kernels.cpu.sorted_rows import SortedRows
from apportion.adapters.kernels.terms import LowRankTerm

# Shapes: T tokens, K experts per token, M sorted rows with those that fill the experts' rooms, G of a term's experts
# that have rows, D model width, I and O a parameter's input and output width, r rank per expert when padded, R summed
# rank of a term's experts, k kept entries of a sparse B.

CodeKey = tuple[int, int]  # a chunk's first row, a term's number


class TermFactors(NamedTuple):
    """One term's factors, as they go into autograd.

    Args:
        a_RI: A.
        b: B, shape (R, O), or the values of a sparse one, shape (k,).
        indices_k: Where a sparse B has its values; None where it is dense.
    """

    a_RI: Tensor
    b: Tensor
    indices_k: Tensor | None

    @classmethod
    def of(cls, term: LowRankTerm) -> TermFactors:
        """Take a term's factors, the values of a sparse B in the type of A."""
        a_RI, b_RO = term.a_RI, term.b_RO
        if isinstance(b_RO, SparseFactor):
            return cls(a_RI, b_RO.values.to(a_RI.dtype), b_RO.indices)
        return cls(a_RI, b_RO, None)

    def dense_b(self, term: LowRankTerm) -> Tensor:
        """Return B as a matrix of shape (R, O)."""
        if self.indices_k is not None and isinstance(term.b_RO, SparseFactor):
            return scattered(self.b, self.indices_k, term.b_RO.shape)
        return self.b


class TermNeeds(NamedTuple):
    """Which of one term's factors need a gradient, in the order of `TermFactors`."""

    a: bool
    b: bool
    indices: bool


class TermGradients(NamedTuple):
    """Gradients of one term's factors, in the order of `TermFactors`; None where none is needed."""

    a_RI: Tensor | None
    b: Tensor | None
    indices_k: None


class PaddedGradients(NamedTuple):
    """Gradients of one term's factors expert by expert, in the order of the rows; None where none is needed."""

    a_GrI: Tensor | None
    b_GrO: Tensor | None


_Entry = TypeVar("_Entry")


def by_term(kind: Callable[[Any, Any, Any], _Entry], flat: Iterable[Any]) -> list[_Entry]:
    """Put what autograd passes one after the other together again, term by term."""
    columns = iter(flat)
    return [kind(*triple) for triple in zip(columns, columns, columns, strict=True)]


@dataclass
class SavedProducts:
    """What a forward pass saves for the backward pass.

    Args:
        entered: What enters the activation, by parameter, shape (M, O).
        masks: Where dropout leaves a parameter's inputs, by parameter, shape (M, I).
        codes: x Aᵀ of a chunk by a term.
    """

    entered: dict[str, Tensor]
    masks: dict[str, Tensor]
    codes: dict[CodeKey, Tensor] = field(default_factory=dict)

    @classmethod
    def room_for(cls, rows: SortedRows, hidden_TD: Tensor) -> SavedProducts:
        """Make room, and draw the masks."""
        entered = {name: hidden_TD.new_empty(rows.room, rows.matrices[name].width_out) for name in rows.form.entering}
        return cls(entered, rows.draw_masks())

    def tensors(self) -> list[Tensor]:
        """Return everything as a list, as `of` takes it."""
        return [*self.entered.values(), *self.masks.values(), *self.codes.values()]

    @classmethod
    def of(cls, rows: SortedRows, tensors: Iterable[Tensor], code_keys: Iterable[CodeKey]) -> SavedProducts:
        """Name the tensors of a list again; more may follow."""
        left = iter(tensors)
        entered = {name: next(left) for name in rows.form.entering}
        masks = {name: next(left) for name in rows.masked}
        return cls(entered, masks, {key: next(left) for key in code_keys})


@dataclass
class Gradients:
    """The gradients that a backward pass fills in.

    Args:
        hidden_MD: Of the tokens, row by row; None where not needed.
        weights_M: Of the routing weights, row by row.
        terms: Of each term's factors.
    """

    hidden_MD: Tensor | None
    weights_M: Tensor
    terms: list[PaddedGradients]

    @classmethod
    def room_for(
        cls,
        rows: SortedRows,
        hidden_TD: Tensor,
        factors: Sequence[TermFactors],
        needs: Sequence[TermNeeds],
        *,
        needs_hidden: bool,
    ) -> Gradients:
        """Make room."""
        terms = []
        for (parameter, term), order, (a_RI, b, _), need in zip(rows.terms, rows.orders, factors, needs, strict=True):
            width_out = len(range(rows.matrices[parameter].width_out)[term.columns])
            num_experts, rank = len(order), max(term.planned.ranks)
            a_GrI = a_RI.new_empty(num_experts, rank, a_RI.shape[1]) if need.a else None
            b_GrO = b.new_empty(num_experts, rank, width_out) if need.b else None
            terms.append(PaddedGradients(a_GrI, b_GrO))
        return cls(
            hidden_MD=hidden_TD.new_empty(rows.room, hidden_TD.shape[1]) if needs_hidden else None,
            weights_M=hidden_TD.new_empty(rows.room),
            terms=terms,
        )

    def of_hidden(self, rows: SortedRows) -> Tensor | None:
        """Return the gradient of the tokens, shape (T, D)."""
        return None if self.hidden_MD is None else rows.sum_over_experts(self.hidden_MD, None)

    def of_weights(self, rows: SortedRows, weights_TK: Tensor) -> Tensor:
        """Return the gradient of the routing weights, shape (T, K)."""
        return rows.by_slot(self.weights_M).to(weights_TK.dtype)

    def of_terms(self, rows: SortedRows, factors: Sequence[TermFactors]) -> list[TermGradients]:
        """Return the gradients of every term's factors."""
        gradients = []
        columns = zip(rows.terms, rows.orders, factors, self.terms, strict=True)
        for (_, term), order, (_, _, indices_k), (grad_a_GrI, grad_b_GrO) in columns:
            a_RI, b_RO = (_unpadded(term, order, grad_GrW) for grad_GrW in (grad_a_GrI, grad_b_GrO))
            if b_RO is not None:
                b_RO.mul_(term.planned.scale(b_RO))
            b = b_RO if b_RO is None or indices_k is None else b_RO.view(-1).index_select(0, indices_k.long())
            gradients.append(TermGradients(a_RI, b, None))
        return gradients


def _unpadded(term: LowRankTerm, order_G: Tensor, grad_GrW: Tensor | None) -> Tensor | None:
    """Return the gradient of a factor of all planned experts, zero where an expert has no rows; shape (R, width)."""
    if grad_GrW is None:
        return None
    grad_HrW = grad_GrW.new_zeros(len(term.planned.experts), *grad_GrW.shape[1:])
    return term.planned.unpadded(grad_HrW.index_copy_(0, order_G, grad_GrW))
