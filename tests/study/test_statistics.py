"""Statistics of data whose truth is known: no effect gives verdicts as rarely as stated, a planted one is found."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

from apportion.study.statistics import Array, compare, corrected, interval

LEVEL = 0.05
SEEDS, TASKS, ITEMS = 5, 2, 60
RESAMPLES = 499


def _runs(
    generator: numpy.random.Generator, effect: float = 0.0, *, run_sd: float = 0.05, interaction: float = 0.0
) -> list[Array]:
    """Draw answers: an item is answered with a chance of its own, moved by the run and by the contender."""
    found = []
    for task in range(TASKS):
        items = numpy.random.default_rng(1000 + task).uniform(0.2, 0.8, ITEMS)  # the same for every contender
        own = generator.normal(0, interaction, ITEMS)
        runs = generator.normal(effect, run_sd, (SEEDS, 1))
        found.append((generator.random((SEEDS, ITEMS)) < items + own + runs).astype(float))
    return found


def _compare(generator: numpy.random.Generator, **drawn: Any) -> Any:
    return compare(_runs(generator, **drawn), _runs(generator), level=LEVEL, comparisons=1, resamples=RESAMPLES)


@pytest.mark.parametrize("run_sd", [0.0, 0.05, 0.15])
def test_without_an_effect_a_verdict_is_as_rare_as_stated(run_sd: float) -> None:
    generator = numpy.random.default_rng(0)
    trials = 200
    found = sum(
        compare(
            _runs(generator, run_sd=run_sd),
            _runs(generator, run_sd=run_sd),
            level=LEVEL,
            comparisons=1,
            resamples=RESAMPLES,
        ).p
        <= LEVEL
        for _ in range(trials)
    )
    assert found / trials <= LEVEL + 2 * (LEVEL * (1 - LEVEL) / trials) ** 0.5


def test_a_difference_on_a_few_items_alone_is_no_verdict() -> None:
    generator = numpy.random.default_rng(1)
    trials = 100
    found = sum(_compare(generator, run_sd=0.0, interaction=0.2).p <= LEVEL for _ in range(trials))
    assert found / trials <= LEVEL + 2 * (LEVEL * (1 - LEVEL) / trials) ** 0.5


def test_in_a_whole_study_without_effects_any_verdict_is_as_rare_as_stated() -> None:
    generator = numpy.random.default_rng(2)
    trials, contenders = 100, 6
    found = 0
    for _ in range(trials):
        reference = _runs(generator)
        p_values = [
            compare(_runs(generator), reference, level=LEVEL, comparisons=contenders, resamples=RESAMPLES).p
            for _ in range(contenders)
        ]
        found += min(corrected(p_values)) <= LEVEL
    assert found / trials <= LEVEL + 2 * (LEVEL * (1 - LEVEL) / trials) ** 0.5


def test_a_planted_effect_is_found_and_measured() -> None:
    generator = numpy.random.default_rng(3)
    tests = [_compare(generator, effect=0.2) for _ in range(40)]
    assert sum(test.p <= LEVEL for test in tests) >= 38
    assert numpy.mean([test.difference.estimate for test in tests]) == pytest.approx(0.2, abs=0.02)


def test_the_smallest_effect_is_seen_as_often_as_stated() -> None:
    generator = numpy.random.default_rng(4)
    effect = float(numpy.median([_compare(generator).smallest_effect for _ in range(30)]))
    found = numpy.mean([_compare(generator, effect=effect).p <= LEVEL for _ in range(100)])
    assert 0.65 <= found <= 0.95


def test_intervals_hold_the_truth_as_often_as_stated() -> None:
    generator = numpy.random.default_rng(5)
    held = 0
    for _ in range(100):
        difference = _compare(generator, effect=0.1).difference
        held += difference.low <= 0.1 <= difference.high
    assert held >= 90


def test_one_seed_gives_no_verdict_and_no_smallest_effect() -> None:
    ones, zeros = [numpy.ones((1, 50))] * 2, [numpy.zeros((1, 50))] * 2
    test = compare(ones, zeros, level=LEVEL, comparisons=1, resamples=RESAMPLES)
    assert (test.p, test.smallest_effect, test.difference.estimate) == (1.0, None, 1.0)


def test_too_few_runs_can_show_nothing() -> None:
    ones, zeros = [numpy.ones((5, 50))], [numpy.zeros((5, 50))]
    test = compare(ones, zeros, level=LEVEL, comparisons=1, resamples=RESAMPLES)
    assert test.p == pytest.approx(2 / 2**5)
    assert test.smallest_effect is None


def test_losses_have_no_items() -> None:
    better = [numpy.array([[1.0], [1.1], [1.2], [1.05], [1.15]])] * 2
    worse = [task + 0.3 + numpy.array([[0.0], [0.01], [0.02], [0.03], [0.04]]) for task in better]
    test = compare(worse, better, level=LEVEL, comparisons=1, resamples=9999)
    assert test.p == pytest.approx(2 / 2**10)
    assert test.difference.low < 0.32 < test.difference.high
    assert 0 < test.smallest_effect < 0.1


def test_an_interval_of_one_loss_is_the_loss() -> None:
    found = interval([numpy.array([[0.5]])], LEVEL, RESAMPLES)
    assert (found.low, found.estimate, found.high) == (0.5, 0.5, 0.5)


def test_tasks_count_the_same_whatever_their_items() -> None:
    assert interval([numpy.ones((2, 10)), numpy.zeros((2, 90))], LEVEL, RESAMPLES).estimate == 0.5


def test_the_correction_is_that_of_benjamini_and_hochberg() -> None:
    assert corrected([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 4 * 0.04 / 3, 4 * 0.04 / 3, 0.5])
    assert corrected([]) == []
