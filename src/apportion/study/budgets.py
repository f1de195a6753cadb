"""Equal budgets: make every contender's plan spend as much as every other's."""

from __future__ import annotations

import bisect
from typing import Any

from apportion.errors import ConfigurationError
from apportion.methods.planning import plan
from apportion.records.plan import Plan
from apportion.records.profile import Profile
from apportion.study.records import Unit
from apportion.study.settings import Contender


def spent_by(made: Plan, unit: Unit) -> int:
    """Return what a plan takes: trainable parameters, or its adapters' operations per token, to the nearest one."""
    return made.cost.trainable_parameters if unit == "parameters" else round(made.cost.adapter_flops_per_token)


def resolve_budget(budget: int | str, profile: Profile, unit: Unit) -> int:
    """Turn a study's budget into a number.

    Args:
        budget: A number, or ``METHOD:RANK`` for as many as that takes on all of the profile's tasks.
        profile: What was measured of the model.
        unit: What is counted.

    Returns:
        The number.

    Raises:
        ConfigurationError: the method or the rank does not fit the model.
    """
    if isinstance(budget, int):
        return budget
    method, _, rank = budget.partition(":")
    return spent_by(plan(profile, method, rank=int(rank)), unit)


def fit(profile: Profile, contender: Contender, unit: Unit, budget: int, tolerance: float, seed: int) -> Plan:
    """Plan a contender so that it spends a budget, and not more.

    A method that takes a budget is told it. Every other gets the largest rank that fits, where no kind of sites goes
    above its narrowest side; then the ranks of single kinds rise, the costliest kind first, as long as they fit.

    Args:
        profile: What was measured of the model on the task.
        contender: The contender; not full fine-tuning.
        unit: What the budget counts.
        budget: The budget.
        tolerance: Share of the budget that may be left, unless the contender may stay below it.
        seed: Seed of methods that draw at random.

    Returns:
        The plan.

    Raises:
        ConfigurationError: no plan spends that much, or none so little; or an option does not fit the model.
    """
    made = _told(profile, contender, unit, budget, seed) if contender.told_budget else None
    made = made or _largest(profile, contender, unit, budget, seed)
    taken = spent_by(made, unit)
    if taken > budget or (taken < (1 - tolerance) * budget and not contender.below_budget):
        raise ConfigurationError(
            f"{contender.name} cannot be planned at {budget:,} {unit}: the nearest plan takes {taken:,}.",
            fix=(
                f"choose another budget, other options for {contender.name}, a tolerance above {tolerance:g}, or "
                "below_budget = true"
            ),
        )
    return made


def _told(profile: Profile, contender: Contender, unit: Unit, budget: int, seed: int) -> Plan:
    """Plan with a method that takes a budget."""
    rank = {} if contender.rank is None else {"rank": contender.rank}
    return plan(profile, contender.method, seed=seed, budget=f"{unit}={budget}", **rank, **contender.options)


def _largest(profile: Profile, contender: Contender, unit: Unit, budget: int, seed: int) -> Plan:
    """Plan at the largest rank that fits, then raise single kinds."""
    given: dict[str, int] = dict(contender.options.get("ranks", {}))
    least = plan(profile, contender.method, rank=1, seed=seed, **contender.options)
    if spent_by(least, unit) > budget:
        raise ConfigurationError(
            f"the budget of {budget:,} {unit} is too small for {contender.name}: at rank 1 it takes "
            f"{spent_by(least, unit):,}.",
            fix="give more, or adapt fewer sites",
        )
    highest = _highest_ranks(least, profile, given)

    def at(rank: int, raised: dict[str, int]) -> Plan:
        ranks = given | {kind: most for kind, most in highest.items() if most < rank} | raised
        options: dict[str, Any] = contender.options | ({"ranks": ranks} if ranks else {})
        return plan(profile, contender.method, rank=rank, seed=seed, **options)

    every = range(1, max(highest.values(), default=1) + 1)
    rank = bisect.bisect_right(every, budget, key=lambda rank: spent_by(at(rank, {}), unit))
    best = at(rank, {})
    raised: dict[str, int] = {}
    open_kinds = [kind for kind, most in highest.items() if most > rank]
    for kind in sorted(open_kinds, key=lambda kind: -spent_by(at(rank, {kind: rank + 1}), unit)):
        for higher in range(rank + 1, highest[kind] + 1):
            tried = at(rank, raised | {kind: higher})
            if spent_by(tried, unit) > budget:
                break
            best, raised = tried, raised | {kind: higher}
    return best


def _highest_ranks(made: Plan, profile: Profile, given: dict[str, int]) -> dict[str, int]:
    """Return the highest rank that every placed kind's narrowest site takes, but for kinds with a rank of their own."""
    highest: dict[str, int] = {}
    for placement in made.placements:
        site = profile.layout.by_name[placement.site]
        if site.kind not in given:
            narrow = min(site.in_features, site.out_features)
            highest[site.kind] = min(narrow, highest.get(site.kind, narrow))
    return highest
