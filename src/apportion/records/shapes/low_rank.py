"""The shape `low_rank`: plain LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from apportion.records.shapes.base import Part, ScaledFactors


@dataclass(frozen=True)
class LowRank(ScaledFactors):
    """LoRA: both factors train.

    Args:
        rank: Rank of the factors.
        alpha: Scale numerator.

    Source: LoRA, arXiv:2106.09685.
    """

    kind: ClassVar[str] = "low_rank"

    def parts(self, in_features: int, out_features: int) -> Iterator[Part]:
        """Return A of shape (rank, in) and B of shape (out, rank)."""
        yield Part(self.rank * in_features)
        yield Part(self.rank * out_features)
