"""Where the rows of a stack of experts' factors are: each expert's rank and scale."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.adapters.constants import constant

# Shapes: H planned experts, R their summed rank, r rows per expert when padded,
# N = H·r padded rows, W any width.


class ExpertRows(NamedTuple):
    """One expert's rows of a stacked factor, and its scale."""

    rows: slice
    scale: float


@dataclass(frozen=True)
class ExpertFactors:
    """What one adapter plans for one projection of a layer's experts.

    Args:
        experts: Ids of the planned experts, in rising order.
        ranks: Rank of each.
        scales: alpha / rank of each.
    """

    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    def scale(self, factor_RW: Tensor) -> Tensor | float:
        """Return what a factor is multiplied by: each row's scale, shape (R, 1), or the one number that all have."""
        if len(set(self.scales)) == 1:
            return self.scales[0]
        pairs = zip(self.ranks, self.scales, strict=True)
        scales = tuple(scale for rank, scale in pairs for _ in range(rank))
        return constant(scales, factor_RW.device).to(factor_RW.dtype).unsqueeze(1)

    def by_expert(self, stacked_RW: Tensor) -> dict[int, Tensor]:
        """Cut a tensor of R rows into each expert's rows, as views."""
        return dict(zip(self.experts, torch.split_with_sizes(stacked_RW, self.ranks), strict=True))

    @cached_property
    def rows_of_experts(self) -> dict[int, ExpertRows]:
        """Each expert's rows among the R, and its scale."""
        ends = itertools.accumulate(self.ranks)
        columns = zip(self.experts, self.ranks, ends, self.scales, strict=True)
        return {expert: ExpertRows(slice(end - rank, end), scale) for expert, rank, end, scale in columns}

    def padded(self, stacked_RW: Tensor, block: int = 1) -> Tensor:
        """Pad a stacked factor to equally many rows per planned expert, with zeros where an expert has fewer.

        Args:
            stacked_RW: Shape (R, width).
            block: What the number of rows is a multiple of.

        Returns:
            Shape (H, rows, width).
        """
        rows = -(-max(self.ranks) // block) * block
        shape = (len(self.ranks), rows, stacked_RW.shape[1])
        if set(self.ranks) == {rows}:
            return stacked_RW.view(shape)
        padded_NW = stacked_RW.new_zeros(shape[0] * rows, shape[2])
        return padded_NW.index_copy(0, self._padded_rows(rows, stacked_RW.device), stacked_RW).view(shape)

    def unpadded(self, padded_HrW: Tensor) -> Tensor:
        """Undo `padded`.

        Args:
            padded_HrW: Shape (H, rows, width).

        Returns:
            Shape (R, width).
        """
        _, rows, width = padded_HrW.shape
        flat_NW = padded_HrW.view(-1, width)
        if set(self.ranks) == {rows}:
            return flat_NW
        return flat_NW.index_select(0, self._padded_rows(rows, padded_HrW.device))

    def _padded_rows(self, rows: int, device: torch.device) -> Tensor:
        """Return where the R rows are among the padded ones, shape (R,)."""
        return constant(
            tuple(number * rows + row for number, rank in enumerate(self.ranks) for row in range(rank)), device
        )
