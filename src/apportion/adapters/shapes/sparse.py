"""The shape `sparse`: a frozen random A and a sparse B, on one matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from apportion.adapters.factors import DenseFactor, FrozenFactor, SparseFactor
from apportion.adapters.shapes.base import Place


@dataclass(frozen=True)
class SparseOptions:
    """How the factors of sparse shapes train and are stored.

    Args:
        dense_b: Whether all of B trains, to find out which entries to keep.
        stored_a: Whether checkpoints hold the frozen A.
    """

    dense_b: bool = False
    stored_a: bool = False


def sparse_factors(place: Place, rank: int, options: SparseOptions) -> tuple[nn.Module, nn.Module]:
    """Make a frozen A, which is not started, and a B without a kept entry.

    Args:
        place: The matrix.
        rank: Rank of all LoRA experts.
        options: Whether B is dense, and whether checkpoints hold A.

    Returns:
        A and B, in float32 except for a dense B.
    """
    a = FrozenFactor(rank, place.in_features, place.device, stored=options.stored_a)
    if options.dense_b:
        return a, DenseFactor((place.out_features, rank), place.device, place.dtype, 0.0)
    return a, SparseFactor(place.out_features, rank, no_entries(place.device), place.device)


def no_entries(device: torch.device) -> torch.Tensor:
    """Return the positions of no entry."""
    return torch.zeros(0, dtype=torch.int32, device=device)
