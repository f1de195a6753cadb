"""Which rows each expert of a layer gets, and what low-rank terms stand on them: the bookkeeping of one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from apportion.adapters.kernels.cpu.chunks import Chunk
from apportion.adapters.kernels.cpu.routed import RoutedExperts
from apportion.adapters.kernels.terms import LowRankTerm

# Shapes: T tokens, K experts per token, S = T·K routed rows sorted by expert, M rows with those that fill the experts'
# rooms, E experts, P of them with rows, D model width.


class ParameterTerm(NamedTuple):
    """A low-rank term and the stacked parameter that it stands on."""

    parameter: str
    term: LowRankTerm


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
        self.routed, self.form, self.matrices = routed, routed.form, routed.matrices
        self.biases = {name: routed.form.bias(routed.module, name) for name in routed.form.parameters}
        self.terms = [ParameterTerm(name, term) for name, terms in routed.terms.items() for term in terms]
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
        rooms_P = self._fill_chunks(sizes_P, patterns_P)
        self.room = int(rooms_P.sum())
        # of each term's experts: those that have rows, by their places among all that it plans
        self.orders = [self._order(number, term, experts_P, patterns_P) for number, (_, term) in enumerate(self.terms)]
        rank_E = numpy.empty(len(sizes_E), dtype=numpy.int16)
        rank_E[experts_P] = numpy.arange(len(experts_P))
        order_S = rank_E[ids_S].argsort(kind="stable")
        # where each sorted row lies: past the rows that fill the rooms of the experts before its own
        filling_P = rooms_P - sizes_P
        place_S = numpy.arange(len(ids_S)) + (filling_P.cumsum() - filling_P).repeat(sizes_P)
        tokens_S = order_S // routed.ids_TK.shape[1]
        tokens_M = tokens_S[sizes_P.cumsum() - sizes_P].repeat(rooms_P)
        tokens_M[place_S] = tokens_S
        self.tokens = torch.from_numpy(tokens_M)
        slot_places_S = numpy.empty_like(place_S)
        slot_places_S[order_S] = place_S
        self.place_TK = torch.from_numpy(slot_places_S).view(routed.ids_TK.shape)

    def _fill_chunks(self, sizes_P: Any, patterns_P: Any) -> Any:
        """Distribute the experts among chunks, and return the room of each, shape (P,)."""
        rooms_P = numpy.empty_like(sizes_P)
        end = 0
        columns = zip(self.present, sizes_P.tolist(), patterns_P.tolist(), strict=True)
        for place, (expert, size, pattern) in enumerate(columns):
            if not self.chunks or not self.chunks[-1].takes(size, pattern):
                self.chunks.append(Chunk.open_for(size, pattern, start=end))
            rooms_P[place] = room = self.chunks[-1].add(expert, size)
            end += room
        return rooms_P

    def _order(self, number: int, term: LowRankTerm, experts_P: Any, patterns_P: Any) -> Tensor:
        """Tell the chunks where a term's experts are, and return the places of all that have rows."""
        end = 0
        for chunk in self.chunks:
            if chunk.pattern >> number & 1:
                chunk.terms[number] = slice(end, end + len(chunk.experts))
                end += len(chunk.experts)
        places_E = numpy.empty(self.form.num_experts, dtype=numpy.int64)
        places_E[list(term.planned.experts)] = numpy.arange(len(term.planned.experts))
        return torch.from_numpy(places_E[experts_P[(patterns_P >> number & 1) == 1]])

    def by_row(self, slots_TK: Tensor) -> Tensor:
        """Bring a number of each slot to its row, shape (M,); rows that fill a block get 0."""
        return slots_TK.new_zeros(self.room).index_copy_(0, self.place_TK.view(-1), slots_TK.reshape(-1))

    def by_slot(self, rows_M: Tensor) -> Tensor:
        """Bring a number of each row back to its slot, shape (T, K)."""
        return rows_M.index_select(0, self.place_TK.view(-1)).view(self.place_TK.shape)

    def plain_matrices(self) -> list[Tensor]:
        """Return the matrices that are not dequantised anew for each product."""
        return [frozen.plain_EOI for frozen in self.matrices.values() if frozen.plain_EOI is not None]

    def draw_masks(self) -> dict[str, Tensor]:
        """Draw where dropout leaves the terms' inputs."""
        return {
            name: torch.empty(self.room, self.matrices[name].width_in, dtype=torch.bool).bernoulli_(
                1 - self.routed.dropout
            )
            for name in self.masked
        }

    def sum_over_experts(self, rows_MD: Tensor, weights_TK: Tensor | None) -> Tensor:
        """Sum, for every token, the rows of its experts, weighted where weights are passed."""
        if weights_TK is None or weights_TK.dtype == rows_MD.dtype:
            return functional.embedding_bag(self.place_TK, rows_MD, mode="sum", per_sample_weights=weights_TK)
        return (rows_MD[self.place_TK] * weights_TK.unsqueeze(2)).sum(1).to(rows_MD.dtype)
