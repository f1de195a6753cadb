"""The shape `sparse`: LoRI."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from apportion.errors import PlanError
from apportion.records.numbers import AnyFloat
from apportion.records.shapes.base import Part, ScaledFactors


@dataclass(frozen=True)
class Sparse(ScaledFactors):
    """LoRI: a frozen random A and a sparse B.

    Args:
        rank: Rank of the factors.
        alpha: Scale numerator.
        sparsity: Share of the entries of B that are zero, above 0 and below 1.

    Source: LoRI, arXiv:2504.07448.
    """

    kind: ClassVar[str] = "sparse"

    sparsity: AnyFloat

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if not 0 < self.sparsity < 1:
            raise PlanError(f"an adapter has sparsity {self.sparsity}.", fix="give a share above 0 and below 1")

    def parts(self, in_features: int, out_features: int) -> Iterator[Part]:
        """Return the frozen A and the kept entries of B."""
        yield Part(self.rank * in_features, trains=False)
        yield Part(self.rank * out_features, keep_frac=1 - self.sparsity)
