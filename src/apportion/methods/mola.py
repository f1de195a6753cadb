"""Numbers of LoRA experts that look at no data: by depth (`mola`), or the same everywhere (`uniform`)."""

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
    """Give every matrix the number of LoRA experts of its part of the layers.

    Args:
        profile: For its layout alone.
        options: The numbers; experts a token.
        settings: Rank and scale of every LoRA expert.

    Returns:
        One placement a matrix.

    Raises:
        ConfigurationError: there are more numbers than layers.

    Source: MoLA, arXiv:2402.08562.
    Differs: layers that the numbers do not divide are split as evenly as can be, earlier parts first.
    """
    numbers = [int(number) for number in options.experts.split("-")]
    check_top_k(options, max(numbers))
    sites = targeted_sites(options, profile.layout)
    layers = sorted({site.layer for site in sites})
    if len(numbers) > len(layers):
        raise ConfigurationError(
            f"experts={options.experts} names {len(numbers)} parts of {len(layers)} layers.", fix="give fewer numbers"
        )
    number_of = {layer: numbers[place * len(numbers) // len(layers)] for place, layer in enumerate(layers)}
    return [settings.place(site, number_of[site.layer], options.top_k) for site in sites]


def place_uniform(profile: Profile, options: UniformOptions, settings: AdapterSettings) -> list[Placement]:
    """Give every matrix the same number of LoRA experts, or with a budget one more or less.

    Args:
        profile: For its layout alone.
        options: The number, or the budget; experts a token.
        settings: Rank and scale of every LoRA expert.

    Returns:
        One placement a matrix; where the budget is smaller than that, on matrices at even distances.

    Raises:
        ConfigurationError: the budget buys no LoRA expert.
        PlanError: the number or the budget is for more LoRA experts than a matrix can have.

    Source: the usual baseline of LoRA-SMoE, arXiv:2505.06272.
    Differs: what a budget leaves over is spread at even distances.
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
    """Share a number out over places, the remainder at even distances.

    Args:
        total: What is shared out.
        places: Places.

    Returns:
        One number a place, which add up to the total and differ by at most one.

    Example:
        >>> spread(7, 4)
        [1, 2, 2, 2]
    """
    return [(place + 1) * total // places - place * total // places for place in range(places)]


def _most_that_fits(budget: str, sites: Sequence[Site], profile: Profile, settings: AdapterSettings) -> int:
    """Find the number of LoRA experts over all sites that takes most of the budget and not more."""
    unit, _, allowed = budget.partition("=")
    if unit == "experts":
        return int(allowed)

    def taken(total: int) -> int:
        pairs = zip(sites, spread(total, len(sites)), strict=True)
        return spent(budget, [settings.place(site, number) for site, number in pairs if number], profile)[0]

    beyond = 1  # rounds over all sites, doubled until they do not fit, or until no matrix can have as many experts
    while taken(beyond * len(sites)) <= int(allowed):
        beyond *= 2
    # Whole rounds that fit; then what of one more round does.
    rounds = bisect.bisect_right(range(1, beyond), int(allowed), key=lambda number: taken(number * len(sites)))
    fitting = [total for total in range(rounds * len(sites), (rounds + 1) * len(sites)) if taken(total) <= int(allowed)]
    most = max(fitting, key=taken, default=0)
    if most == 0:
        raise ConfigurationError(f"the budget {budget} buys no LoRA expert.", fix="give more, or a lower rank")
    return most


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
