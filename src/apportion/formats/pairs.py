"""Pairs of factors with the scale folded in: what every format is written from and compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.formats.factors import SavedAdapter
from apportion.records.site import Site

# R rank; I and O the site's input and output width.


class Pair(NamedTuple):
    """What is added to one matrix: ``b_OR @ a_RI``, and nothing else."""

    site: Site
    a_RI: Tensor
    b_OR: Tensor


def folded(adapter: SavedAdapter, dtype: torch.dtype | None = None) -> Iterator[Pair]:
    """Go through an adapter's sites, with the scale alpha / rank multiplied into B.

    Args:
        adapter: An adapter without routed LoRA experts.
        dtype: Type of the factors; as they are stored if None. The scale is multiplied in float32.

    Yields:
        The pairs, in the plan's order.
    """
    for site, placement, a_RI, b_OR, _ in adapter.factors():
        scaled = b_OR.float() * placement.scale
        yield Pair(site, a_RI.to(dtype or a_RI.dtype), scaled.to(dtype or b_OR.dtype))


def padded(pair: Pair, rank: int) -> Pair:
    """Add zeros to a pair's rank.

    Args:
        pair: The pair.
        rank: The new rank, at least the pair's own.

    Returns:
        A pair with the same product.
    """
    missing = rank - pair.a_RI.shape[0]
    a_RI = torch.nn.functional.pad(pair.a_RI, (0, 0, 0, missing))
    return Pair(pair.site, a_RI, torch.nn.functional.pad(pair.b_OR, (0, missing)))


def nonzero(pair: Pair) -> Iterator[Pair]:
    """Leave out ranks that are zeros in one of the factors; yield the pair unless no rank is left."""
    kept = pair.a_RI.ne(0).any(1) & pair.b_OR.ne(0).any(0)
    if kept.any():
        yield Pair(pair.site, pair.a_RI[kept], pair.b_OR[:, kept])
