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
_HALF_ROWS = 4  # products in half precision take a multiple of so many rows: few shapes for oneDNN to prepare


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
        pad: Products take a multiple of so many rows; what they write past an expert's rows is written again later.
        experts: Ids of those that have rows.
        ends: Where each one's rows end.
    """

    start: int
    pad: int
    experts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    @cached_property
    def window(self) -> slice:
        """The chunk's rows, and those behind it that padded products reach."""
        return slice(self.start, self.ends[-1] + self.pad - 1)

    @cached_property
    def sizes(self) -> list[int]:
        """The rows of each expert, and then those behind the chunk."""
        return [last - first for first, last in itertools.pairwise((self.start, *self.ends, self.window.stop))]

    def cut(self, rows: Tensor, *, padded: bool = False) -> Sequence[Tensor]:
        """Cut the rows of the chunk's window into its experts', each a multiple of `pad` long where `padded`."""
        if not padded or self.pad == 1:
            return torch.split_with_sizes(rows, self.sizes)[:-1]
        starts = (self.start, *self.ends)
        lengths = [-(-size // self.pad) * self.pad for size in self.sizes]
        parts = zip(starts, lengths[:-1], strict=False)
        return [rows.narrow(0, first - self.start, length) for first, length in parts]


class SortedRows:
    """The routed rows of one pass, sorted by expert: who has which, and which experts run together.

    Args:
        routed: The experts, their tokens and their terms.
        dtype: The tokens' type.
    """

    def __init__(self, routed: RoutedExperts, dtype: torch.dtype) -> None:
        self.routed, self.form = routed, routed.form
        found = {name: routed.form.matrices(routed.module, name) for name in routed.form.parameters}
        # as (E, I, O), however they are stored
        self.matrices = {name: matrix if turned else matrix.transpose(1, 2) for name, (matrix, turned) in found.items()}
        self.terms = [(name, term) for name, terms in routed.terms.items() for term in terms]
        self.masked = [name for name, terms in routed.terms.items() if terms and routed.dropout]
        ids_S, self.order_S = routed.ids_TK.reshape(-1).sort(stable=True)
        experts = torch.arange(routed.form.num_experts)
        ends = torch.searchsorted(ids_S, experts, right=True).tolist()
        self.sizes = [last - first for first, last in itertools.pairwise([0, *ends])]
        self.present = [expert for expert, size in enumerate(self.sizes) if size]
        pad = _HALF_ROWS if dtype.itemsize == 2 else 1
        self.room = len(ids_S) + pad - 1
        tokens_S = self.order_S.div(routed.ids_TK.shape[1], rounding_mode="floor")
        self.tokens = functional.pad(tokens_S, (0, pad - 1)) if pad > 1 else tokens_S
        self.chunks: list[Chunk] = []
        for expert in self.present:
            end = ends[expert]
            if not self.chunks or self.chunks[-1].ends[-1] - self.chunks[-1].start >= _CHUNK_ROWS:
                self.chunks.append(Chunk(end - self.sizes[expert], pad))
            self.chunks[-1].experts.append(expert)
            self.chunks[-1].ends.append(end)

    def draw_masks(self) -> dict[str, Tensor]:
        """Draw where dropout leaves the terms' inputs."""
        return {
            name: torch.empty(self.room, self.matrices[name].shape[1], dtype=torch.bool).bernoulli_(
                1 - self.routed.dropout
            )
            for name in self.masked
        }

    def sum_over_experts(self, rows_SD: Tensor, weights: Tensor | None) -> Tensor:
        """Sum, for every token, the rows of its experts, weighted where weights are given."""
        place_S = torch.empty_like(self.order_S)
        place_S[self.order_S] = torch.arange(len(place_S))
        place_TK = place_S.view(self.routed.ids_TK.shape)
        if weights is None or weights.dtype == rows_SD.dtype:
            return functional.embedding_bag(place_TK, rows_SD, mode="sum", per_sample_weights=weights)
        return (rows_SD[place_TK] * weights.unsqueeze(2)).sum(1).to(rows_SD.dtype)
