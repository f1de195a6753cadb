"""Budgets: a number of parameters, of operations or of LoRA experts that a plan may spend."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from apportion.errors import ConfigurationError
from apportion.records.options import RoutedOptions
from apportion.records.plan import Placement, num_trainable

if TYPE_CHECKING:
    from apportion.records.profile import Profile

_DIGITS = 3  # of a sum of operations: the order of adding up must not cost a whole one


def flops_per_token(placements: Iterable[Placement], profile: Profile) -> float:
    """Count the operations that adapters add to the forward pass of one token.

    Args:
        placements: The adapters.
        profile: For the sites, and for the routed slots a token that fall on each expert.

    Returns:
        Two operations a multiply-add, summed over the adapters that a token meets on average.
    """
    total = 0.0
    for placement in placements:
        site = profile.layout.by_name[placement.site]
        per_use = 2 * placement.num_parameters(site)
        total += per_use * (1.0 if site.expert is None else profile.slots_per_token[site.layer, site.expert])
    return total


def spending(unit: str, placements: Iterable[Placement], profile: Profile) -> float:
    """Count what placements take, in a budget's unit.

    Args:
        unit: ``parameters``, ``flops`` or ``experts``.
        placements: What is planned.
        profile: For the model's sites and the experts' shares of tokens.

    Returns:
        The number; whole but for ``flops``.
    """
    if unit == "experts":
        return sum(placement.num_experts for placement in placements)
    if unit == "flops":
        return flops_per_token(placements, profile)
    return num_trainable(list(placements), profile.layout.by_name)


def spent(budget: str, placements: Iterable[Placement], profile: Profile) -> tuple[int, int]:
    """Compare placements with a budget.

    Args:
        budget: As `parse_budget` gives it.
        placements: What is planned.
        profile: For the model's sites and the experts' shares of tokens.

    Returns:
        What the placements take, rounded up, and what there is, in the budget's unit.
    """
    unit, _, number = budget.partition("=")
    return math.ceil(round(spending(unit, placements, profile), _DIGITS)), int(number)


def check_top_k(options: RoutedOptions, largest: int) -> None:
    """Refuse a `top_k` that was given and that no site can have.

    Args:
        options: The method's options.
        largest: LoRA experts of the site that has the largest number of them.

    Raises:
        ConfigurationError: `top_k` was given and is larger.
    """
    if "top_k" in options.given and options.top_k > largest:
        raise ConfigurationError(
            f"top_k={options.top_k} is above the number of LoRA experts that a site can have.\n"
            f"  found:  at most {largest}\n  fix:    give a top_k of at most {largest}"
        )
