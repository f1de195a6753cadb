"""What placements cost: parameters, bytes and operations, counted here and nowhere else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from apportion.records.placement import Placement
from apportion.records.site import Site

if TYPE_CHECKING:
    from apportion.records.profile import Profile

_DIGITS = 6  # of a share of entries: 1 - 0.9 is not quite 0.1


@dataclass(frozen=True)
class Counts:
    """Numbers of an adapter.

    Args:
        trained: Numbers that the optimizer moves.
        drawn: Numbers that are drawn from a seed and never move; checkpoints hold them only on request.
        indices: Positions of kept entries, where factors are sparse.
    """

    trained: int
    drawn: int
    indices: int

    def stored(self, *, with_drawn: bool = False) -> int:
        """Count the numbers in a checkpoint, positions apart.

        Args:
            with_drawn: Whether it holds what was drawn.

        Returns:
            The number.
        """
        return self.trained + (self.drawn if with_drawn else 0)


def count(placements: Iterable[Placement], sites: Mapping[str, Site], *, dense: bool = False) -> Counts:
    """Count the numbers that placements train, draw and keep positions of; a tensor that sites share counts once.

    Args:
        placements: The placements.
        sites: The model's sites by name.
        dense: Count sparse factors whole, as they train while it is sought which entries to keep.

    Returns:
        The counts.
    """
    trained = drawn = 0
    sparse: Counter[float] = Counter()
    seen: set[str] = set()
    matrices = Counter((p.shape, sites[p.site].in_features, sites[p.site].out_features) for p in placements)
    for (shape, in_features, out_features), number in matrices.items():
        for part in shape.parts(in_features, out_features):
            if part.shared in seen:
                continue
            if part.shared is not None:
                seen.add(part.shared)
            entries = part.entries * (number if part.shared is None else 1)
            if not part.trains:
                drawn += entries
            elif part.keep_frac == 1 or dense:
                trained += entries
            else:
                sparse[part.keep_frac] += entries
    kept = sum(num_kept(entries, frac) for frac, entries in sparse.items())
    return Counts(trained + kept, drawn, kept)


def num_kept(entries: int, keep_frac: float) -> int:
    """Count the entries that a share keeps, rounded up.

    Args:
        entries: Entries of all sites with this share.
        keep_frac: Share that exists.

    Returns:
        Entries that are kept.

    Example:
        >>> num_kept(21_004_288, 1 - 0.9)
        2100429
    """
    return math.ceil(round(keep_frac * entries, _DIGITS))


def flops_per_token(placements: Iterable[Placement], profile: Profile) -> float:
    """Count the operations that adapters add to the forward pass of one token.

    Args:
        placements: The adapters.
        profile: For the sites, and for the routed slots per token that fall on each expert.

    Returns:
        Two operations per multiply-add, summed over the adapters that a token meets on average.
    """
    total = 0.0
    flops = cache(lambda shape, in_features, out_features: shape.flops(in_features, out_features))
    for placement in placements:
        site = profile.layout.by_name[placement.site]
        slots = 1.0 if site.expert is None else profile.slots_per_token[site.layer, site.expert]
        total += flops(placement.shape, site.in_features, site.out_features) * slots
    return total
