"""Which rows each expert of a layer gets, and what low-rank terms stand on them: the bookkeeping of one pass."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from apportion.adapters.factors import ExpertFactors, SparseFactor
from apportion.expert_forms import ExpertForm

# Shapes: T tokens, K experts a token, S = T·K rows sorted by expert, E experts, D model width, I and O a parameter's
# input and output width, R summed rank of a term's experts.

_CHUNK_ROWS = 256  # rows that run together: enough to keep small operations few, few enough for the cache


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
        ids_S, self.order_S = routed.ids_TK.reshape(-1).sort(stable=True)
        experts = torch.arange(routed.form.num_experts)
        ends_E = torch.searchsorted(ids_S, experts, right=True)
        sizes_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        self.sizes = [_whole_blocks(size) for size in sizes_E.tolist()]
        self.present = [expert for expert, size in enumerate(self.sizes) if size]
        self.room = sum(self.sizes)
        # where each sorted row lies: past the rows that fill the blocks of the experts before its own
        filling_E = torch.tensor(self.sizes) - sizes_E
        self.place_S = torch.arange(len(ids_S)) + (filling_E.cumsum(0) - filling_E)[ids_S]
        tokens_S = self.order_S.div(routed.ids_TK.shape[1], rounding_mode="floor")
        first_tokens = tokens_S[(ends_E - sizes_E)[self.present]]
        self.tokens = first_tokens.repeat_interleave(
            torch.tensor([self.sizes[expert] for expert in self.present]).long()
        )
        self.tokens.index_copy_(0, self.place_S, tokens_S)
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
        sorted_S = slots_TK.reshape(-1).index_select(0, self.order_S)
        return sorted_S.new_zeros(self.room).index_copy_(0, self.place_S, sorted_S)

    def by_slot(self, rows: Tensor) -> Tensor:
        """Bring a number of each row back to its slot, shape (T, K)."""
        sorted_S = rows.index_select(0, self.place_S)
        return torch.empty_like(sorted_S).index_copy_(0, self.order_S, sorted_S).view(self.routed.ids_TK.shape)

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
        place_S = torch.empty_like(self.order_S).index_copy_(0, self.order_S, self.place_S)
        place_TK = place_S.view(self.routed.ids_TK.shape)
        if weights is None or weights.dtype == rows_SD.dtype:
            return functional.embedding_bag(place_TK, rows_SD, mode="sum", per_sample_weights=weights)
        return (rows_SD[place_TK] * weights.unsqueeze(2)).sum(1).to(rows_SD.dtype)


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
