"""Budgets: a number of parameters, of operations or of LoRA experts that a plan may spend; shares of what there is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from apportion.counting import count, flops_per_token
from apportion.errors import ConfigurationError
from apportion.methods.base import MethodOptions
from apportion.methods.targets import ALL_TARGETS
from apportion.records.placement import Placement
from apportion.records.profile import Profile

LINEAR_TARGETS: tuple[str, ...] = tuple(kind for kind in ALL_TARGETS if kind in ("attention", "shared", "dense"))
_DIGITS = 3  # of a sum of operations: the order of adding up must not cost a whole one


def parse_budget(value: Any) -> str | None:
    """Read a budget.

    Args:
        value: Such as ``5000000`` or ``"parameters=5000000"``, ``"flops=80000"`` or ``"experts=688"``; None for none.

    Returns:
        ``parameters=N``, ``flops=N`` or ``experts=N``.

    Raises:
        ConfigurationError: it is none of them.
    """
    if value is None:
        return None
    match = re.fullmatch(r"(?:(experts|parameters|flops)=)?([\d_,]{1,24})", str(value).strip().lower())
    number = int(re.sub("[_,]", "", match[2]) or 0) if match else 0
    if match is None or number < 1:
        raise ConfigurationError(
            f"budget={value!r} is not understood.\n"
            "  fix:  give parameters (5000000), operations a token (flops=80000) or LoRA experts (experts=688)"
        )
    return f"{match[1] or 'parameters'}={number}"


def parse_plain_budget(value: Any) -> str | None:
    """Read a budget of a method that places plain LoRA, of which LoRA experts are no measure.

    Args:
        value: As `parse_budget` takes it.

    Returns:
        ``parameters=N`` or ``flops=N``.

    Raises:
        ConfigurationError: it is neither.
    """
    budget = parse_budget(value)
    if budget and budget.startswith("experts="):
        raise ConfigurationError(
            f"budget={value!r} counts LoRA experts, and this method places plain LoRA.\n"
            "  fix:  give parameters (5000000) or operations a token (flops=80000)"
        )
    return budget


def parse_share(value: Any) -> Any:
    """Read a share that may be written as a percentage.

    Args:
        value: Such as ``0.25`` or ``"25%"``.

    Returns:
        The share; what is no percentage as it is.
    """
    text = str(value).strip()
    number = text.removesuffix("%")
    return float(number) / 100 if text != number and number.replace(".", "", 1).isdigit() else value


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


class RoutedOptions(MethodOptions):
    """Options of the methods that place several LoRA experts on a matrix.

    Args:
        targets: What is adapted; by default every linear layer outside the routed experts.
        top_k: LoRA experts that a token uses; all of a site's where it has fewer.
    """

    targets: tuple[str, ...] = LINEAR_TARGETS
    top_k: Annotated[int, Field(ge=1)] = 2

    def check_top_k(self, most: int) -> None:
        """Refuse a `top_k` that was asked for and that no site can have.

        Args:
            most: LoRA experts of the site that has most of them.

        Raises:
            ConfigurationError: `top_k` was given and is larger.
        """
        if self.top_k != RoutedOptions.model_fields["top_k"].default and self.top_k > most:
            raise ConfigurationError(
                f"top_k={self.top_k} is above the number of LoRA experts that a site can have.\n"
                f"  found:  at most {most}\n  fix:    give a top_k of at most {most}"
            )


class BudgetOptions(RoutedOptions):
    """Options of the methods that can be told how much to spend.

    Args:
        budget: Parameters (``5000000``), operations a token (``flops=80000``) or LoRA experts (``experts=688``): the
            most that fits is planned.
    """

    budget: Annotated[str | None, BeforeValidator(parse_budget)] = None
