"""Budgets: a number of parameters, of operations or of LoRA experts that a plan may spend."""

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

_DIGITS = 3  # of a sum of operations: the order of adding up must not cost a whole one


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
    return count(placements, profile.layout.by_name).trained


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
            f"top_k={options.top_k} is above the number of LoRA experts that a site can have.",
            found=f"at most {largest}",
            fix=f"give a top_k of at most {largest}",
        )
