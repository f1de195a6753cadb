"""Numbers of LoRA experts that do not depend on data: by depth (`mola`) or the same everywhere (`uniform`)."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from apportion.errors import ConfigurationError
from apportion.methods.base import AdapterSettings, Method
from apportion.methods.budget import check_top_k, spent
from apportion.methods.targets import targeted_sites
from apportion.records.options import MolaOptions, UniformOptions
from apportion.records.placement import Placement
from apportion.records.site import Site

if TYPE_CHECKING:
    from apportion.records.profile import Profile


def place_mola(profile: Profile, options: MolaOptions, settings: AdapterSettings) -> list[Placement]:
    """Give each matrix the number of LoRA experts of its part of the layers.

    Args:
        profile: Only its layout is used.
        options: The numbers; LoRA experts per token.
        settings: Rank and scale of each LoRA expert.

    Returns:
        One placement per matrix.

    Raises:
        ConfigurationError: there are more numbers than layers.

    Source: MoLA, arXiv:2402.08562.
    Differs: if the layers cannot be split equally, they are split as evenly as possible, earlier parts first.
    """
    numbers = [int(number) for number in options.experts.split("-")]
    check_top_k(options, max(numbers))
    sites = targeted_sites(options, profile.layout)
    layers = sorted({site.layer for site in sites})
    if len(numbers) > len(layers):
        raise ConfigurationError(
            f"experts={options.experts} has {len(numbers)} numbers for {len(layers)} layers.", fix="give fewer numbers"
        )
    number_of = {layer: numbers[place * len(numbers) // len(layers)] for place, layer in enumerate(layers)}
    return [settings.place(site, number_of[site.layer], options.top_k) for site in sites]


def place_uniform(profile: Profile, options: UniformOptions, settings: AdapterSettings) -> list[Placement]:
    """Give each matrix the same number of LoRA experts. With a budget, numbers differ by at most one.

    Args:
        profile: Only its layout is used.
        options: The number, or the budget; LoRA experts per token.
        settings: Rank and scale of each LoRA expert.

    Returns:
        One placement per matrix. If the budget does not suffice for all, evenly spaced matrices get one.

    Raises:
        ConfigurationError: the budget is too small for one LoRA expert.
        PlanError: a matrix would get more LoRA experts than it can have.

    Source: the usual baseline of LoRA-SMoE, arXiv:2505.06272.
    Differs: the remainder of a budget is spread evenly.
    """
    sites = targeted_sites(options, profile.layout)
    if options.budget is None:
        check_top_k(options, options.experts)
        return [settings.place(site, options.experts, options.top_k) for site in sites]

    def placed(total: int) -> list[Placement]:
        numbers = spread(total, len(sites))
        pairs = zip(sites, numbers, strict=True)
        return [settings.place(site, number, options.top_k) for site, number in pairs if number]

    total = _most_that_fits(options.budget, sites, profile, settings)
    check_top_k(options, max(spread(total, len(sites))))
    return placed(total)


def spread(total: int, places: int) -> list[int]:
    """Split a number evenly over places, with the remainder at even distances.

    Args:
        total: Number to split.
        places: Number of places.

    Returns:
        One number per place. They sum to the total and differ by at most one.

    Example:
        >>> spread(7, 4)
        [1, 2, 2, 2]
    """
    return [(place + 1) * total // places - place * total // places for place in range(places)]


def _most_that_fits(budget: str, sites: Sequence[Site], profile: Profile, settings: AdapterSettings) -> int:
    """Return the number of LoRA experts over all sites that uses the most of the budget without exceeding it."""
    unit, _, allowed = budget.partition("=")
    if unit == "experts":
        return int(allowed)

    def taken(total: int) -> int:
        pairs = zip(sites, spread(total, len(sites)), strict=True)
        return spent(budget, [settings.place(site, number) for site, number in pairs if number], profile)[0]

    upper = 1  # LoRA experts per site, doubled until they exceed the budget or the maximum per matrix
    while taken(upper * len(sites)) <= int(allowed):
        upper *= 2
    # The number per site that fits, then the remainder.
    per_site = bisect.bisect_right(range(1, upper), int(allowed), key=lambda number: taken(number * len(sites)))
    totals = range(per_site * len(sites), (per_site + 1) * len(sites))
    best = max((total for total in totals if taken(total) <= int(allowed)), key=taken, default=0)
    if best == 0:
        raise ConfigurationError(
            f"the budget {budget} is too small for one LoRA expert.", fix="give a larger budget, or a lower rank"
        )
    return best


MOLA = Method(
    name="mola",
    summary="baseline: numbers of routed LoRA experts by depth",
    source="MoLA, arXiv:2402.08562",
    options=MolaOptions,
    place=place_mola,
)
UNIFORM = Method(
    name="uniform",
    summary="baseline: the same number of routed LoRA experts on every matrix",
    source="control at lora_smoe's budget",
    options=UniformOptions,
    place=place_uniform,
)
