"""Verdicts say in words what the numbers are."""

from __future__ import annotations

from typing import Any

from apportion.study.records import Comparison, Interval
from apportion.study.settings import check_settings
from apportion.study.verdict import verdicts


def _comparison(**changes: Any) -> Comparison:
    told = {
        "model": "embedded", "task": "all", "budget": 98304, "contender": "hellora", "reference": "lora",
        "metric": "exact_match", "runs": 10, "difference": Interval(estimate=-0.021, low=-0.039, high=-0.004),
        "p": 0.002, "p_corrected": 0.01, "smallest_effect": 0.03, "differs": True,
    }  # fmt: skip
    return Comparison.model_validate(told | changes)


def _sentences(*comparisons: Comparison, finished: int = 20, **changes: Any) -> tuple[str, ...]:
    told = {"name": "x", "tasks": {"a": "task:aiw"}, "contenders": ["lora", "hellora", "full"], "budgets": [98304]}
    return verdicts(check_settings(told | changes), list(comparisons), finished, 20)


def test_a_difference_is_told_with_its_interval() -> None:
    overall, sentence = _sentences(_comparison())
    assert sentence == (
        "At 98,304 parameters hellora answered 2.1 points (0.4 to 3.9) fewer items than lora (corrected p = 0.01)."
    )
    assert overall == "1 of 1 comparisons with lora show a difference (worse than lora: hellora at 98,304)."


def test_no_difference_is_told_with_what_could_not_have_been_seen() -> None:
    unclear = _comparison(differs=False, difference=Interval(estimate=0.005, low=-0.02, high=0.031))
    overall, sentence = _sentences(unclear)
    assert overall == "The data cannot tell any contender from lora, in 1 comparison at a level of 0.05."
    assert sentence == (
        "At 98,304 parameters the data cannot tell hellora and lora apart: the difference is 0.5 points (-2.0 to 3.1); "
        "a difference of less than 3.0 points could not have been seen."
    )


def test_a_higher_loss_is_worse() -> None:
    overall, sentence = _sentences(
        _comparison(metric="loss", difference=Interval(estimate=0.2, low=0.1, high=0.3)), metric="loss"
    )
    assert "worse than lora: hellora" in overall
    assert "hellora ended with a loss 0.200 nats (0.100 to 0.300) higher than lora" in sentence


def test_full_fine_tuning_is_never_said_to_be_at_the_budget() -> None:
    _, sentence = _sentences(_comparison(contender="full"))
    assert "full (full fine-tuning, at no budget) answered" in sentence


def test_nothing_is_claimed_too_early() -> None:
    assert _sentences(_comparison(differs=False), finished=3)[0].startswith("3 of 20 runs are done: no verdict")
    assert _sentences(_comparison(differs=False, smallest_effect=None), seeds=1)[0].startswith("One seed: no verdict")
    few = _sentences(_comparison(differs=False, smallest_effect=None))
    assert few[0].startswith("No verdict is possible: 10 pairs of runs")
    assert "so few runs can show no difference at all" in few[1]
