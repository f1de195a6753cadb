"""Count the parameters, bytes and operations of placements."""

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

_DIGITS = 6  # rounding of shares of entries: 1 - 0.9 is not exactly 0.1


@dataclass(frozen=True)
class Counts:
    """Parameter counts of an adapter.

    Args:
        trained: Trained parameters.
        drawn: Frozen parameters drawn from a seed. Checkpoints store them only on request.
        indices: Positions of kept entries, for sparse factors.
    """

    trained: int
    drawn: int
    indices: int

    def stored(self, *, with_drawn: bool = False) -> int:
        """Count the parameters in a checkpoint, without positions.

        Args:
            with_drawn: Whether the checkpoint stores the frozen parameters.

        Returns:
            Number of parameters.
        """
        return self.trained + (self.drawn if with_drawn else 0)


def count(placements: Iterable[Placement], sites: Mapping[str, Site], *, dense: bool = False) -> Counts:
    """Count the trained and frozen parameters and the positions of placements. Shared tensors count once.

    Args:
        placements: The placements.
        sites: The model's sites by name.
        dense: Count sparse factors as dense, as in the first training phase, before the mask is known.

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
    kept_entries = sum(num_kept(entries, frac) for frac, entries in sparse.items())
    return Counts(trained + kept_entries, drawn, kept_entries)


def num_kept(entries: int, keep_frac: float) -> int:
    """Count the kept entries of a share, rounded up.

    Args:
        entries: Entries of all sites with this share.
        keep_frac: Share of the entries to keep.

    Returns:
        Number of kept entries.

    Example:
        >>> num_kept(21_004_288, 1 - 0.9)
        2100429
    """
    return math.ceil(round(keep_frac * entries, _DIGITS))


def flops_per_token(placements: Iterable[Placement], profile: Profile) -> float:
    """Count the operations per token that adapters add to the forward pass.

    Args:
        placements: The adapters.
        profile: Profile with the sites and each expert's routed slots per token.

    Returns:
        Operations per token, averaged over routing. A multiply-add counts as two.
    """
    total = 0.0
    flops = cache(lambda shape, in_features, out_features: shape.flops(in_features, out_features))
    for placement in placements:
        site = profile.layout.by_name[placement.site]
        slots = 1.0 if site.expert is None else profile.slots_per_token[site.layer, site.expert]
        total += flops(placement.shape, site.in_features, site.out_features) * slots
    return total
