"""The shape `low_rank`: plain LoRA, on one matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apportion.adapters.factors import DenseFactor
from apportion.adapters.shapes.base import Draw, LoraPair, Place, Shape

# Shapes: T tokens (over any leading dimensions), I and O input and output width, R rank.


class LowRank(Shape):
    """``scale · B A`` with factors of any kind.

    Args:
        lora_A: A module with the ``weight`` A of shape (R, I), which multiplies rows by it.
        lora_B: The same for B, of shape (O, R).
        scale: alpha / rank.
    """

    lora_A: Any
    lora_B: Any

    def __init__(self, lora_A: nn.Module, lora_B: nn.Module, scale: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scale = lora_A, lora_B, scale

    @property
    def dtype(self) -> torch.dtype:
        """Type of A."""
        weight: Tensor = self.lora_A.weight
        return weight.dtype

    def as_lora(self) -> LoraPair | None:
        """Return the factors."""
        return LoraPair(self.lora_A.weight, self.lora_B.weight, self.scale)

    def delta(self, x_TI: Tensor) -> Tensor:
        """Multiply by both factors; a sparse B is not kept for the backward pass."""
        delta_TO: Tensor = self.lora_B(self.lora_A(x_TI) * self.scale)
        return delta_TO

    def start(self, draw: Draw) -> None:
        """Draw A; B is zero."""
        draw(self.lora_A.weight)


def low_rank(place: Place, rank: int, scale: float) -> LowRank:
    """Make plain LoRA.

    Args:
        place: The matrix, or the stacked matrices.
        rank: Rank.
        scale: alpha / rank.

    Returns:
        The adapter; A is not started, B is zero.
    """
    return LowRank(*dense_factors(place, rank), scale)


def dense_factors(place: Place, rank: int) -> tuple[DenseFactor, DenseFactor]:
    """Make factors that train: A, which is not started, and B, which is zero.

    Args:
        place: The matrix, or the stacked matrices.
        rank: Rank.

    Returns:
        A and B.
    """
    a = DenseFactor((*place.copies, rank, place.in_features), place.device, place.dtype)
    return a, DenseFactor((*place.copies, place.out_features, rank), place.device, place.dtype, 0.0)
