"""Every contender spends as much as every other, and never more than the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apportion.errors import ConfigurationError
from apportion.records.profile import Profile
from apportion.study.budgets import plan_at_budget, resolve_budget, spent_by
from apportion.study.records import Unit
from apportion.study.settings import Contender
from apportion.study.store import load_study


@pytest.fixture(scope="module")
def measured(finished: Path) -> Profile:
    return load_study(finished).profile("embedded")


@pytest.mark.parametrize("budget", ["lora:2", "lora:4"])
@pytest.mark.parametrize("unit", ["parameters", "flops"])
@pytest.mark.parametrize(
    "told",
    [
        {"method": "lora"},
        {"method": "attention"},
        {"method": "hellora", "hot": 4},
        {"method": "hellora", "hot": "coverage=0.6"},
        {"method": "hellora", "hot": 4, "ranks": {"router": 1}},
        {"method": "cold", "hot": 2},
        {"method": "lori"},
    ],
)
def test_plans_spend_the_budget_and_not_more(measured: Profile, told: dict[str, Any], unit: Unit, budget: str) -> None:
    number = resolve_budget(budget, measured, unit)
    made = plan_at_budget(measured, Contender.model_validate(told), unit, number, 0.12, 0)
    assert 0.88 * number <= spent_by(made, unit) <= number


def test_a_budget_that_a_method_defines_is_its_own_plan(measured: Profile) -> None:
    number = resolve_budget("lora:3", measured, "parameters")
    made = plan_at_budget(measured, Contender.model_validate("lora"), "parameters", number, 0.01, 0)
    assert made.rank == 3
    assert made.options["ranks"] == {}


def test_a_method_that_takes_a_budget_is_told_it(measured: Profile) -> None:
    contender = Contender.model_validate({"method": "uniform", "rank": 2})
    made = plan_at_budget(measured, contender, "parameters", 50_000, 0.05, 0)
    assert made.options["budget"] == "parameters=50000"
    assert made.rank == 2


def test_a_contender_may_stay_below_where_it_is_allowed(measured: Profile) -> None:
    told = {"method": "hellori", "hot": 1}
    with pytest.raises(ConfigurationError, match="cannot be planned"):
        plan_at_budget(measured, Contender.model_validate(told), "parameters", 250_000, 0.05, 0)
    made = plan_at_budget(
        measured, Contender.model_validate(told | {"below_budget": True}), "parameters", 250_000, 0.05, 0
    )
    assert spent_by(made, "parameters") < 0.95 * 250_000
