"""The shape `blocks`: several small LoRAs, each on its slice of the input and of the output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from apportion.errors import PlanError
from apportion.records.numbers import WholeNumber
from apportion.records.shapes.base import MAX_WIDTH, Part, ScaledFactors


@dataclass(frozen=True)
class Blocks(ScaledFactors):
    """MELoRA: block-diagonal factors.

    Args:
        rank: Rank of each block.
        alpha: Scale numerator.
        blocks: Number of blocks. It divides both widths of the matrix.

    Source: MELoRA, arXiv:2402.17263.
    """

    kind: ClassVar[str] = "blocks"

    blocks: WholeNumber

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if not 1 <= self.blocks <= MAX_WIDTH // self.rank:
            raise PlanError(
                f"an adapter has {self.blocks} blocks of rank {self.rank}.",
                fix=f"give at least 1 block, with blocks times rank at most {MAX_WIDTH}",
            )

    @property
    def lora_rank(self) -> int:
        """Rank of the equivalent plain LoRA, whose factors are zero outside the blocks."""
        return self.blocks * self.rank

    def check(self, in_features: int, out_features: int) -> None:
        """Refuse a matrix that cannot be cut into as many blocks."""
        if in_features % self.blocks or out_features % self.blocks:
            raise PlanError(
                f"a matrix of {out_features} x {in_features} cannot be cut into {self.blocks} equal blocks.",
                fix="give a number of blocks that divides both widths, or leave the matrix out of the targets",
            )

    def parts(self, in_features: int, out_features: int) -> Iterator[Part]:
        """Return A of shape (blocks, rank, in / blocks) and B of shape (blocks, out / blocks, rank)."""
        yield Part(self.rank * in_features)
        yield Part(self.rank * out_features)
