"""Which rows each expert of a layer gets, and what low-rank terms stand on them: the bookkeeping of one pass."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from apportion.adapters.factors import ExpertFactors, SparseFactor
from apportion.experts.forms import ExpertForm

# Shapes: T tokens, K experts a token, S = T·K rows sorted by expert, E experts, P of them with rows,
# H of them planned, N terms of one parameter, D model width, I and O a parameter's input and output width, r rank of an
# expert, R summed rank of a term's experts.

_CHUNK_ROWS = 1024  # rows that run together: enough to keep small operations few, few enough for the cache
_SPARE_ROWS = 16  # as many may fill the room of an expert in a batch, or an eighth of it


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
    """Experts that run together: some without any term, or some with the same terms and as many rows each.

    Args:
        start: The first one's first row.
        pattern: Which terms stand on them: bit n for the pass's term n.
        room: Rows of each; None where each has its own number.
        experts: Ids.
        ends: Where each one's rows end.
        terms: For each term that stands on them, where they are among its experts in this pass.
    """

    start: int
    pattern: int
    room: int | None
    experts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    terms: dict[int, slice] = field(default_factory=dict)

    def takes(self, size: int, pattern: int) -> bool:
        """Tell whether an expert with so many rows and such terms belongs here too."""
        if pattern != self.pattern or (self.ends and self.ends[-1] - self.start >= _CHUNK_ROWS):
            return False
        return self.room is None or self.room - size <= max(_SPARE_ROWS, self.room // 8)

    def add(self, expert: int, size: int) -> int:
        """Give an expert its rows, and tell how many they are."""
        room = _whole_blocks(size) if self.room is None else self.room
        self.experts.append(expert)
        self.ends.append((self.ends[-1] if self.ends else self.start) + room)
        return room

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

    def batch(self, rows: Tensor) -> Tensor:
        """Give the rows of the chunk's window as a batch of experts, each with its rows."""
        return rows.view(len(self.experts), -1, rows.shape[-1])


class SortedRows:
    """The routed rows of one pass, sorted by expert: who has which, and which experts run together.

    Experts with terms come last, those with the same terms together and by falling number of rows, so that the
    products of several run as one batch. An expert's room is a whole number of blocks, or the largest of its batch. The
    rows that fill it are copies of its first one, finite where that is; no output is made of them and they weigh
    nothing, so no gradient comes from them either.

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
        patterns_E = numpy.zeros(len(sizes_E), dtype=numpy.int64)
        for number, (_, term) in enumerate(self.terms):
            patterns_E[list(term.planned.experts)] |= 1 << number
        experts_P = sizes_E.nonzero()[0]
        sizes_P, patterns_P = sizes_E[experts_P], patterns_E[experts_P]
        order_P = numpy.lexsort((-sizes_P * (patterns_P > 0), patterns_P))
        experts_P, sizes_P, patterns_P = experts_P[order_P], sizes_P[order_P], patterns_P[order_P]
        self.present: list[int] = experts_P.tolist()
        self.chunks: list[Chunk] = []
        rooms_P = numpy.empty_like(sizes_P)
        end = 0
        for place, (expert, size, pattern) in enumerate(
            zip(self.present, sizes_P.tolist(), patterns_P.tolist(), strict=True)
        ):
            if not self.chunks or not self.chunks[-1].takes(size, pattern):
                self.chunks.append(Chunk(end, pattern, _whole_blocks(size) if pattern else None))
            rooms_P[place] = room = self.chunks[-1].add(expert, size)
            end += room
        self.room = end
        # of each term's experts: those that have rows, by their places among all that it plans
        self.orders = [self._order(number, term, experts_P, patterns_P) for number, (_, term) in enumerate(self.terms)]
        rank_E = numpy.empty(len(sizes_E), dtype=numpy.int16)
        rank_E[experts_P] = numpy.arange(len(experts_P))
        order_S = rank_E[ids_S].argsort(kind="stable")
        # where each sorted row lies: past the rows that fill the rooms of the experts before its own
        filling_P = rooms_P - sizes_P
        place_S = numpy.arange(len(ids_S)) + (filling_P.cumsum() - filling_P).repeat(sizes_P)
        tokens_S = order_S // routed.ids_TK.shape[1]
        tokens = tokens_S[sizes_P.cumsum() - sizes_P].repeat(rooms_P)
        tokens[place_S] = tokens_S
        self.tokens = torch.from_numpy(tokens)
        slot_places_S = numpy.empty_like(place_S)
        slot_places_S[order_S] = place_S
        self.place_TK = torch.from_numpy(slot_places_S).view(routed.ids_TK.shape)

    def _order(self, number: int, term: LowRankTerm, experts_P: Any, patterns_P: Any) -> Tensor:
        """Tell the chunks where a term's experts are, and give the places of all that have rows."""
        end = 0
        for chunk in self.chunks:
            if chunk.pattern >> number & 1:
                chunk.terms[number] = slice(end, end + len(chunk.experts))
                end += len(chunk.experts)
        places_E = numpy.empty(self.form.num_experts, dtype=numpy.int64)
        places_E[list(term.planned.experts)] = numpy.arange(len(term.planned.experts))
        return torch.from_numpy(places_E[experts_P[(patterns_P >> number & 1) == 1]])

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
