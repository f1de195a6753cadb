"""How many experts a layer keeps, and which: shared by `hellora` and its controls."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from apportion.errors import ConfigurationError, ProfileError, shortened
from apportion.methods.targets import targeted_sites
from apportion.records.options import Criterion, HotOptions
from apportion.records.site import Site

if TYPE_CHECKING:
    from apportion.records.arrays import Array
    from apportion.records.profile import Profile

# Shapes: L layers, E experts.


def heat(profile: Profile, criterion: Criterion) -> Array:
    """Return the quantity that experts are ranked by.

    Args:
        profile: The profile; tasks are summed.
        criterion: Ranking criterion, as in `HotOptions`.

    Returns:
        Float64, shape (L, E); columns past a layer's number of experts are zero.

    Raises:
        ConfigurationError: the model has no routed experts.
        ProfileError: a layer has no routed token, or sensitivity was not measured.
    """
    if not profile.layout.is_moe:
        raise ConfigurationError(
            f"{profile.layout.model_class} is a dense model: it has no routed experts.",
            fix="use --method lora or --method attention",
        )
    heats: dict[Criterion, Callable[[], Array]] = {
        "count": lambda: profile.counts_LE.astype(np.float64),
        "mass": lambda: profile.mass_LE,
        "sensitivity": lambda: profile.sensitivity_LE,
        "sensitivity_count": lambda: profile.sensitivity_LE * profile.counts_LE,
    }
    heat_LE = heats[criterion]()
    for block, row in zip(profile.layout.blocks, heat_LE, strict=True):
        if float(row.sum()) <= 0:
            raise ProfileError(
                f"layer {block.layer} has no routed token in this profile, so its experts cannot be ranked.",
                place=block.name,
                fix="profile again on more data",
            )
    return heat_LE


def experts_kept(heat_E: Array, hot: int | str) -> int:
    """Return how many experts a layer keeps.

    Args:
        heat_E: The layer's heat, shape (E,), without padding.
        hot: Number, percentage or coverage, as in `HotOptions`. Percentages are rounded up.

    Returns:
        At least 1.

    Raises:
        ConfigurationError: the layer has fewer experts than `hot`.
    """
    num_experts = len(heat_E)
    if isinstance(hot, int):
        if hot > num_experts:
            raise ConfigurationError(
                f"hot={shortened(str(hot))} asks for more experts than a layer has.", found=f"{num_experts} experts"
            )
        return hot
    if hot.endswith("%"):
        return max(1, math.ceil(round(float(hot[:-1]) / 100 * num_experts, 9)))
    wanted = float(hot.removeprefix("coverage=")) * float(heat_E.sum())
    covered = np.sort(heat_E)[::-1].cumsum()
    reached = int((covered < wanted * (1 - 1e-12)).sum()) + 1
    return min(reached, num_experts)


def hottest(heat_E: Array, k: int) -> list[int]:
    """Pick the k hottest experts of a layer; ties go to the lower id.

    Args:
        heat_E: The layer's heat, shape (E,).
        k: Experts to keep.

    Returns:
        Expert ids in ascending order.

    Example:
        >>> hottest(np.array([3.0, 9.0, 3.0, 1.0]), 2)
        [0, 1]
    """
    return coldest(-heat_E, k)


def coldest(heat_E: Array, k: int) -> list[int]:
    """Pick the k coldest experts of a layer; ties go to the lower id.

    Args:
        heat_E: The layer's heat, shape (E,).
        k: Experts to keep.

    Returns:
        Expert ids in ascending order.
    """
    ids: list[int] = np.argsort(heat_E, kind="stable")[:k].tolist()
    return sorted(ids)


def drawn(num_experts: int, k: int, seed: str) -> list[int]:
    """Sample k experts of a layer, deterministically for a seed.

    Args:
        num_experts: Experts to sample from.
        k: Experts to keep.
        seed: Any text.

    Returns:
        Expert ids in rising order.
    """
    return sorted(random.Random(seed).sample(range(num_experts), k))  # noqa: S311 - no secret


def sites_with_experts(profile: Profile, options: HotOptions, chosen: list[list[int]]) -> list[Site]:
    """Return the targeted sites, without the routed experts that were not chosen.

    Args:
        profile: The profile.
        options: Options with the targets.
        chosen: Chosen expert ids of every block.

    Returns:
        The sites, in the layout's order.

    Raises:
        ConfigurationError: the targets do not include the routed experts.
    """
    sites = targeted_sites(options, profile.layout)
    if not any(site.kind == "experts" for site in sites):
        narrowed = f"targets {','.join(options.targets)}" + (f" and layers {options.layers}" if options.layers else "")
        raise ConfigurationError(
            f"{narrowed} do not include the routed experts that this method chooses from.",
            fix="add experts to the targets, or use --method lora",
        )
    blocks = zip(profile.layout.blocks, chosen, strict=True)
    expert_ids = {(block.layer, expert) for block, ids in blocks for expert in ids}
    return [site for site in sites if site.kind != "experts" or (site.layer, site.expert) in expert_ids]


def rows_of_blocks(profile: Profile, heat_LE: Array) -> list[Array]:
    """Remove the padding beyond each layer's number of experts."""
    return [row[: block.num_experts] for block, row in zip(profile.layout.blocks, heat_LE, strict=True)]


def layer_seed(seed: int, layer: int) -> str:
    """Return the seed of a layer, so that layers are sampled independently."""
    return f"{seed}/{layer}"
