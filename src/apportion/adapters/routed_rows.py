"""Which rows each expert of a layer gets, and what low-rank terms stand on them: the bookkeeping of one pass."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from apportion.adapters.factors import ExpertFactors, SparseFactor
from apportion.expert_forms import ExpertForm

# Shapes: T tokens, K experts a token, S = T·K rows sorted by expert, E experts, P of them with rows,
# H of them planned, N terms of one parameter, D model width, I and O a parameter's input and output width, r rank of an
# expert, R summed rank of a term's experts.

_CHUNK_ROWS = 1024  # rows that run together: enough to keep small operations few, few enough for the cache


@dataclass(frozen=True)
class LowRankTerm:
    """LoRA on some experts of one projection.

    Args:
        a_RI: The experts' A, one under the other.
        b_RO: The experts' B transposed, one under the other; dense, or sparse.
        planned: The experts, their ranks and scales.
        columns: The projection's part of the output.
    """

    a_RI: Tensor
    b_RO: Tensor | SparseFactor
    planned: ExpertFactors
    columns: slice

    def to(self, dtype: torch.dtype) -> LowRankTerm:
        """Round the factors, as mixed precision does, gradients passing; the values of a sparse B follow A."""
        b_RO = self.b_RO.to(dtype) if isinstance(self.b_RO, Tensor) else self.b_RO
        return replace(self, a_RI=self.a_RI.to(dtype), b_RO=b_RO)


def joined(terms: Sequence[LowRankTerm]) -> Sequence[LowRankTerm]:
    """Join the terms of one parameter, so that every expert has one pair of products where it had two.

    Each expert's A go one under the other, and its B into the columns that they have in the output, zeros beside them.

    Args:
        terms: All that stand on the parameter.

    Returns:
        One term where all plan the same experts with one rank and dense factors; else those that were given.
    """
    if len(terms) < 2 or len({(term.planned.experts, term.planned.ranks, term.planned.scales) for term in terms}) > 1:
        return terms
    first, dense = terms[0].planned, [term.b_RO for term in terms if isinstance(term.b_RO, Tensor)]
    if len(set(first.ranks)) > 1 or len(dense) < len(terms):
        return terms
    num_experts, rank = len(first.experts), first.ranks[0]
    a_HNrI = torch.stack([term.a_RI.view(num_experts, rank, -1) for term in terms], 1)
    b_HNrO = a_HNrI.new_zeros((num_experts, len(terms), rank, sum(b_RO.shape[1] for b_RO in dense)))
    for number, (term, b_RO) in enumerate(zip(terms, dense, strict=True)):
        b_HNrO[:, number, :, term.columns] = b_RO.view(num_experts, rank, -1)
    planned = replace(first, ranks=(len(terms) * rank,) * num_experts)
    return [LowRankTerm(a_HNrI.flatten(0, 2), b_HNrO.flatten(0, 2), planned, slice(None))]


@dataclass(frozen=True)
class RoutedExperts:
    """Frozen experts, and the rows that are routed to them.

    Args:
        module: The experts module.
        form: Its form: called with routed tokens, without a norm after each expert.
        ids_TK: Expert ids, shape (T, K).
        terms: The low-rank terms by parameter.
        dropout: Share of the terms' inputs that is dropped.
    """

    module: nn.Module
    form: ExpertForm
    ids_TK: Tensor
    terms: Mapping[str, Sequence[LowRankTerm]]
    dropout: float = 0.0


@dataclass
class Chunk:
    """Consecutive experts that run together.

    Args:
        start: The first one's first row.
        experts: Ids of those that have rows.
        ends: Where each one's rows end.
    """

    start: int
    experts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    @cached_property
    def window(self) -> slice:
        """The chunk's rows."""
        return slice(self.start, self.ends[-1])

    @cached_property
    def sizes(self) -> list[int]:
        """The rows of each expert."""
        return [last - first for first, last in itertools.pairwise((self.start, *self.ends))]

    def cut(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Cut the rows of the chunk's window into its experts'."""
        return torch.split_with_sizes(rows, self.sizes)


class SortedRows:
    """The routed rows of one pass, sorted by expert: who has which, and which experts run together.

    Each expert has a whole number of blocks of rows. The rows that fill the last block are copies of its first one,
    finite where that is; no output is made of them and they weigh nothing, so no gradient comes from them either.

    Args:
        routed: The experts, their tokens and their terms.
    """

    def __init__(self, routed: RoutedExperts) -> None:
        self.routed, self.form = routed, routed.form
        found = {name: routed.form.matrices(routed.module, name) for name in routed.form.parameters}
        # as (E, O, I), however they are stored
        self.matrices = {name: matrix.transpose(1, 2) if turned else matrix for name, (matrix, turned) in found.items()}
        self.terms = [(name, term) for name, terms in routed.terms.items() for term in terms]
        self.masked = [name for name, terms in routed.terms.items() if terms and routed.dropout]
        ids_S = routed.ids_TK.reshape(-1).numpy()
        sizes_E = numpy.bincount(ids_S, minlength=routed.form.num_experts)
        experts_P = sizes_E.nonzero()[0]
        sizes_P = sizes_E[experts_P]
        rooms_P = numpy.array([_whole_blocks(size) for size in sizes_P.tolist()], dtype=numpy.int64)
        self.present: list[int] = experts_P.tolist()
        self.sizes: dict[int, int] = dict(zip(self.present, rooms_P.tolist(), strict=True))
        self.room = int(rooms_P.sum())
        order_S = ids_S.astype(numpy.int16).argsort(kind="stable")
        # where each sorted row lies: past the rows that fill the blocks of the experts before its own
        filling_P = rooms_P - sizes_P
        place_S = numpy.arange(len(ids_S)) + (filling_P.cumsum() - filling_P).repeat(sizes_P)
        tokens_S = order_S // routed.ids_TK.shape[1]
        tokens = tokens_S[sizes_P.cumsum() - sizes_P].repeat(rooms_P)
        tokens[place_S] = tokens_S
        self.tokens = torch.from_numpy(tokens)
        slot_places_S = numpy.empty_like(place_S)
        slot_places_S[order_S] = place_S
        self.place_TK = torch.from_numpy(slot_places_S).view(routed.ids_TK.shape)
        self.chunks: list[Chunk] = []
        end = 0
        for expert in self.present:
            if not self.chunks or end - self.chunks[-1].start >= _CHUNK_ROWS:
                self.chunks.append(Chunk(end))
            end += self.sizes[expert]
            self.chunks[-1].experts.append(expert)
            self.chunks[-1].ends.append(end)

    def by_row(self, slots_TK: Tensor) -> Tensor:
        """Bring a number of each slot to its row; rows that fill a block get 0."""
        return slots_TK.new_zeros(self.room).index_copy_(0, self.place_TK.view(-1), slots_TK.reshape(-1))

    def by_slot(self, rows: Tensor) -> Tensor:
        """Bring a number of each row back to its slot, shape (T, K)."""
        return rows.index_select(0, self.place_TK.view(-1)).view(self.place_TK.shape)

    def draw_masks(self) -> dict[str, Tensor]:
        """Draw where dropout leaves the terms' inputs."""
        return {
            name: torch.empty(self.room, self.matrices[name].shape[2], dtype=torch.bool).bernoulli_(
                1 - self.routed.dropout
            )
            for name in self.masked
        }

    def sum_over_experts(self, rows_SD: Tensor, weights: Tensor | None) -> Tensor:
        """Sum, for every token, the rows of its experts, weighted where weights are given."""
        if weights is None or weights.dtype == rows_SD.dtype:
            return functional.embedding_bag(self.place_TK, rows_SD, mode="sum", per_sample_weights=weights)
        return (rows_SD[self.place_TK] * weights.unsqueeze(2)).sum(1).to(rows_SD.dtype)


def _whole_blocks(size: int) -> int:
    """Round a number of rows up, by a sixteenth at most from 64 on, so that oneDNN prepares products of few shapes.

    Args:
        size: The rows of an expert.

    Returns:
        At least as many.

    Example:
        >>> [_whole_blocks(size) for size in (0, 1, 3, 5, 65, 129, 1000)]
        [0, 1, 3, 8, 68, 136, 1024]
    """
    block = 1 if size < 4 else max(4, 1 << max(size.bit_length() - 5, 0))
    return -(-size // block) * block
