"""Budgets: limits on the parameters, operations or LoRA experts of a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from apportion.counting import count, flops_per_token
from apportion.errors import ConfigurationError
from apportion.records.options import RoutedOptions
from apportion.records.placement import Placement

if TYPE_CHECKING:
    from apportion.records.profile import Profile

_DIGITS = 3  # rounding of sums of operations, which depend on the order of summation


def spending(unit: str, placements: Iterable[Placement], profile: Profile) -> float:
    """Count the cost of placements in a budget's unit.

    Args:
        unit: ``parameters``, ``flops`` or ``experts``.
        placements: The placements.
        profile: Profile with the model's sites and routing.

    Returns:
        The cost. An integer, except for ``flops``.
    """
    if unit == "experts":
        return sum(placement.num_experts for placement in placements)
    if unit == "flops":
        return flops_per_token(placements, profile)
    return count(placements, profile.layout.by_name).trained


def spent(budget: str, placements: Iterable[Placement], profile: Profile) -> tuple[int, int]:
    """Compare the cost of placements with a budget.

    Args:
        budget: A budget, as returned by `parse_budget`.
        placements: The placements.
        profile: Profile with the model's sites and routing.

    Returns:
        The cost, rounded up, and the budget, both in the budget's unit.
    """
    unit, _, number = budget.partition("=")
    return math.ceil(round(spending(unit, placements, profile), _DIGITS)), int(number)


def check_top_k(options: RoutedOptions, largest: int) -> None:
    """Check that a given `top_k` is not above the number of LoRA experts of every site.

    Args:
        options: The method's options.
        largest: Largest number of LoRA experts of a site.

    Raises:
        ConfigurationError: `top_k` was given and is larger.
    """
    if "top_k" in options.given and options.top_k > largest:
        raise ConfigurationError(
            f"top_k={options.top_k} is above the number of LoRA experts that a site can have.",
            found=f"at most {largest}",
            fix=f"give a top_k of at most {largest}",
        )
