"""Equal budgets: plan every contender at the same cost."""

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
    """Return a plan's cost: trainable parameters, or its adapters' operations per token, rounded."""
    return made.cost.trainable_parameters if unit == "parameters" else round(made.cost.adapter_flops_per_token)


def resolve_budget(budget: int | str, profile: Profile, unit: Unit) -> int:
    """Turn a study's budget into a number.

    Args:
        budget: A number, or ``METHOD:RANK`` for the cost of that method on all of the profile's tasks.
        profile: The model's profile.
        unit: Unit of the budget.

    Returns:
        The number.

    Raises:
        ConfigurationError: the method or the rank does not fit the model.
    """
    if isinstance(budget, int):
        return budget
    method, _, rank = budget.partition(":")
    return spent_by(plan(profile, method, rank=int(rank)), unit)


def plan_at_budget(
    profile: Profile, contender: Contender, unit: Unit, budget: int, tolerance: float, seed: int
) -> Plan:
    """Plan a contender at a budget, or just below.

    A method with a `budget` option gets the budget. All others get the largest rank that fits, with the rank of each
    kind of sites limited by its narrowest matrix. Then the ranks of single kinds are raised as far as they fit, the
    costliest kind first.

    Args:
        profile: The model's profile on the task.
        contender: The contender; not full fine-tuning.
        unit: Unit of the budget.
        budget: The budget.
        tolerance: Fraction of the budget that may be left unused, unless the contender has `below_budget`.
        seed: Seed of methods that draw at random.

    Returns:
        The plan.

    Raises:
        ConfigurationError: no plan is close enough to the budget, or an option does not fit the model.
    """
    made = _at_budget(profile, contender, unit, budget, seed) if contender.told_budget else None
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


def _at_budget(profile: Profile, contender: Contender, unit: Unit, budget: int, seed: int) -> Plan:
    """Plan with a method that has a `budget` option."""
    rank = {} if contender.rank is None else {"rank": contender.rank}
    return plan(profile, contender.method, seed=seed, budget=f"{unit}={budget}", **rank, **contender.options)


def _largest(profile: Profile, contender: Contender, unit: Unit, budget: int, seed: int) -> Plan:
    """Plan at the largest rank that fits, then raise the ranks of single kinds."""
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
        ranks = given | {kind: limit for kind, limit in highest.items() if limit < rank} | raised
        options: dict[str, Any] = contender.options | ({"ranks": ranks} if ranks else {})
        return plan(profile, contender.method, rank=rank, seed=seed, **options)

    every = range(1, max(highest.values(), default=1) + 1)
    rank = bisect.bisect_right(every, budget, key=lambda rank: spent_by(at(rank, {}), unit))
    best = at(rank, {})
    raised: dict[str, int] = {}
    open_kinds = [kind for kind, limit in highest.items() if limit > rank]
    for kind in sorted(open_kinds, key=lambda kind: -spent_by(at(rank, {kind: rank + 1}), unit)):
        for higher in range(rank + 1, highest[kind] + 1):
            tried = at(rank, raised | {kind: higher})
            if spent_by(tried, unit) > budget:
                break
            best, raised = tried, raised | {kind: higher}
    return best


def _highest_ranks(made: Plan, profile: Profile, given: dict[str, int]) -> dict[str, int]:
    """Return the highest rank of each placed kind's narrowest site, except for kinds with a given rank."""
    highest: dict[str, int] = {}
    for placement in made.placements:
        site = profile.layout.by_name[placement.site]
        if site.kind not in given:
            narrow = min(site.in_features, site.out_features)
            highest[site.kind] = min(narrow, highest.get(site.kind, narrow))
    return highest
