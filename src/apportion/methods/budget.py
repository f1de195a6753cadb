"""Budgets: a number of LoRA experts or of parameters that a plan may spend."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from apportion.errors import ConfigurationError
from apportion.methods.base import MethodOptions
from apportion.methods.targets import ALL_TARGETS
from apportion.records.plan import Placement, num_trainable
from apportion.records.site import Layout

LINEAR_TARGETS: tuple[str, ...] = tuple(kind for kind in ALL_TARGETS if kind in ("attention", "shared", "dense"))


def parse_budget(value: Any) -> str | None:
    """Read a budget.

    Args:
        value: Such as ``5000000`` or ``"parameters=5000000"``, or ``"experts=688"``; None for none.

    Returns:
        ``parameters=N`` or ``experts=N``.

    Raises:
        ConfigurationError: it is neither.
    """
    if value is None:
        return None
    match = re.fullmatch(r"(?:(experts|parameters)=)?([\d_,]+)", str(value).strip().lower())
    number = int(re.sub("[_,]", "", match[2]) or 0) if match else 0
    if match is None or number < 1:
        raise ConfigurationError(
            f"budget={value!r} is not understood.\n  fix:  give parameters (5000000) or LoRA experts (experts=688)"
        )
    return f"{match[1] or 'parameters'}={number}"


def spent(budget: str, placements: Iterable[Placement], layout: Layout) -> tuple[int, int]:
    """Compare placements with a budget.

    Args:
        budget: As `parse_budget` gives it.
        placements: What is planned.
        layout: The model's sites.

    Returns:
        What the placements take, and what there is, in the budget's unit.
    """
    unit, _, number = budget.partition("=")
    if unit == "experts":
        return sum(placement.num_experts for placement in placements), int(number)
    return num_trainable(list(placements), layout.by_name), int(number)


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
        budget: Parameters (``5000000``) or LoRA experts (``experts=688``): the most that fits is planned.
    """

    budget: Annotated[str | None, BeforeValidator(parse_budget)] = None
