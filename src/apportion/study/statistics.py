"""Paired statistics of runs: intervals, permutation tests, correction, and what could not have been seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray
from scipy import stats

from apportion.study.records import Interval

Array = NDArray[numpy.float64]

POWER = 0.8
_SEED = 0

# Shapes: S seeds of a task, I items of a task.


@dataclass(frozen=True)
class PairedTest:
    """A paired difference, and what the data say about it.

    Args:
        difference: The estimate and its interval.
        p: The larger p of the tests over runs and over items; 1 where there is one seed.
        smallest_effect: What the design could have seen; None if it can see nothing.
    """

    difference: Interval
    p: float
    smallest_effect: float | None


def interval(scores: Sequence[Array], level: float, resamples: int) -> Interval:
    """Estimate a mean over tasks, each of which counts the same, with a bootstrap interval.

    Runs are resampled within tasks, and, where there are several items, items within tasks; the wider of both on each
    side is kept, so that the interval speaks of other seeds and of other items. Each quantile is moved outwards as
    Student's t is wider than the normal distribution, for a bootstrap of few runs is too narrow.

    Args:
        scores: For each task, shape (S, I); I is 1 where there are no items.
        level: One minus the interval's confidence.
        resamples: Bootstrap resamples.

    Returns:
        The interval; the estimate alone where there is nothing to resample.

    Source: Hesterberg, What teachers should know about the bootstrap, 2015: the expanded percentile interval.
    Differs: with several tasks, the degrees of freedom are those of all of them.
    """
    estimate = float(numpy.mean([task.mean() for task in scores]))
    bounds = [(estimate, estimate)]
    for samples in ([task.mean(1) for task in scores], [task.mean(0) for task in scores]):
        smallest = min(len(sample) for sample in samples)
        freedom = sum(len(sample) - 1 for sample in samples)
        if smallest < 2 or all(numpy.ptp(sample) == 0 for sample in samples):
            continue
        expanded = numpy.sqrt(smallest / (smallest - 1)) * stats.t.ppf(1 - level / 2, freedom)
        found = stats.bootstrap(
            samples,
            _mean_of_means,
            confidence_level=1 - 2 * stats.norm.sf(expanded),
            n_resamples=resamples,
            method="percentile",
            vectorized=True,
            batch=1000,
            rng=numpy.random.default_rng(_SEED),
        ).confidence_interval
        bounds.append((float(found.low), float(found.high)))
    return Interval(estimate=estimate, low=min(low for low, _ in bounds), high=max(high for _, high in bounds))


def compare(
    contender: Sequence[Array], reference: Sequence[Array], *, level: float, comparisons: int, resamples: int
) -> PairedTest:
    """Compare two contenders whose runs are paired by task and seed, and whose items are the same.

    Two permutation tests exchange the two contenders at random: over runs, each pair of runs as a whole; and over
    items, each item's answers averaged over seeds. The first asks whether other seeds would say the same, the second
    whether other items would. Either may be fooled by what the other one sees, so the larger p is taken: a difference
    has to hold over both.

    Args:
        contender: For each task, its scores, shape (S, I).
        reference: For each task, the reference's, of the same shapes.
        level: The level of significance.
        comparisons: Comparisons of the study: the smallest effect is that of a comparison that differs alone.
        resamples: Of the bootstrap and of tests too large to be exact.

    Returns:
        The test.
    """
    pairs = list(zip(contender, reference, strict=True))
    differences = [mine - other for mine, other in pairs]
    difference = interval(differences, level, resamples)
    num_runs = sum(len(task) for task in differences)
    if min(len(task) for task in differences) < 2:
        return PairedTest(difference, 1.0, None)
    by_run = [([mine.mean(1) for mine, _ in pairs], [other.mean(1) for _, other in pairs])]
    by_item = [([mine.mean(0) for mine, _ in pairs], [other.mean(0) for _, other in pairs])]
    with_items = min(task.shape[1] for task in differences) > 1
    p = max(_permutation_p(*samples, resamples) for samples in by_run + (by_item if with_items else []))
    alone = level / comparisons
    if 2 / 2**num_runs > alone:  # the smallest p that so many pairs of runs can give
        return PairedTest(difference, p, None)
    freedom = num_runs - len(differences)
    errors = [_standard_error([task.mean(1) for task in differences])]
    if with_items:
        errors.append(_standard_error([task.mean(0) for task in differences]))
    factor = stats.t.ppf(1 - alone / 2, freedom) + stats.t.ppf(POWER, freedom)
    return PairedTest(difference, p, float(factor * max(errors)))


def corrected(p_values: Sequence[float]) -> list[float]:
    """Correct for many comparisons: of the differences that are claimed, on average at most the level's share is false.

    Args:
        p_values: Of all comparisons.

    Returns:
        The corrected p, in the same order. Where nothing differs, the chance that any is below the level is at most the
        level.

    Source: Benjamini and Hochberg, 1995.
    Differs: nothing.
    """
    return [float(p) for p in stats.false_discovery_control(p_values)] if p_values else []


def _mean_of_means(*samples: Array, axis: int = -1) -> Array:
    """Average each task, then the tasks."""
    means: Array = numpy.mean([sample.mean(axis=axis) for sample in samples], axis=0)
    return means


def _permutation_p(contender: Sequence[Array], reference: Sequence[Array], resamples: int) -> float:
    """Exchange the two within each pair, pairs of all tasks together; each task counts the same."""
    weights = numpy.concatenate([numpy.full(len(task), 1 / (len(contender) * len(task))) for task in contender])

    def difference(mine: Array, other: Array, axis: int = -1) -> Array:
        weighted: Array = numpy.sum((mine - other) * weights, axis=axis)
        return weighted

    found = stats.permutation_test(
        (numpy.concatenate(contender), numpy.concatenate(reference)),
        difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=1000,
        rng=numpy.random.default_rng(_SEED),
    )
    return float(min(1.0, found.pvalue))


def _standard_error(samples: Sequence[Array]) -> float:
    """Return the standard error of the mean over tasks."""
    return float(numpy.sqrt(sum(numpy.var(sample, ddof=1) / len(sample) for sample in samples)) / len(samples))
