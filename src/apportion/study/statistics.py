"""Paired statistics of runs: intervals, permutation tests, correction, and the smallest detectable effect."""

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

# Shapes: S seeds per task, I items per task.


@dataclass(frozen=True)
class PairedTest:
    """A paired difference and its test.

    Args:
        difference: The estimate and its interval.
        p: The larger p of the tests over runs and over items; 1 with one seed.
        smallest_effect: Smallest difference that the design could detect; None if it can detect none.
    """

    difference: Interval
    p: float
    smallest_effect: float | None


def interval(scores: Sequence[Array], level: float, resamples: int) -> Interval:
    """Estimate a mean over tasks, with equal weights, and its bootstrap interval.

    Runs are resampled within tasks and, if there are several items, items within tasks. On each side the wider interval
    is used, so that it covers other seeds and other items. Quantiles are moved outwards by the ratio of Student's t to
    the normal distribution, because a bootstrap of few runs is too narrow.

    Args:
        scores: For each task, shape (S, I); I is 1 if there are no items.
        level: One minus the interval's confidence.
        resamples: Number of bootstrap resamples.

    Returns:
        The interval; its ends equal the estimate if there is nothing to resample.

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
        bootstrapped = stats.bootstrap(
            samples,
            _mean_of_means,
            confidence_level=1 - 2 * stats.norm.sf(expanded),
            n_resamples=resamples,
            method="percentile",
            vectorized=True,
            batch=1000,
            rng=numpy.random.default_rng(_SEED),
        ).confidence_interval
        bounds.append((float(bootstrapped.low), float(bootstrapped.high)))
    return Interval(estimate=estimate, low=min(low for low, _ in bounds), high=max(high for _, high in bounds))


def compare(
    contender: Sequence[Array], reference: Sequence[Array], *, level: float, comparisons: int, resamples: int
) -> PairedTest:
    """Compare two contenders whose runs are paired by task and seed, and whose items are the same.

    Two permutation tests exchange the two contenders at random: over runs, each pair of runs as a whole; and over
    items, each item's answers averaged over seeds. The first tests whether the difference holds for other seeds, the
    second whether it holds for other items. The larger p is used, so that a difference must hold for both.

    Args:
        contender: For each task, the contender's scores, shape (S, I).
        reference: For each task, the reference's, of the same shapes.
        level: The level of significance.
        comparisons: Number of comparisons of the study; the smallest effect is for the level divided by it.
        resamples: Number of resamples of the bootstrap, and of tests that are too large to be exact.

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
    """Correct for multiple comparisons by controlling the false discovery rate.

    Args:
        p_values: The p values of all comparisons.

    Returns:
        The corrected p values, in the same order. On average, at most a fraction `level` of the differences with
        p below it are false. If nothing differs, the probability of any such p is at most the level.

    Source: Benjamini and Hochberg, 1995.
    Differs: nothing.
    """
    return [float(p) for p in stats.false_discovery_control(p_values)] if p_values else []


def _mean_of_means(*samples: Array, axis: int = -1) -> Array:
    """Return the mean over tasks of each task's mean."""
    means: Array = numpy.mean([sample.mean(axis=axis) for sample in samples], axis=0)
    return means


def _permutation_p(contender: Sequence[Array], reference: Sequence[Array], resamples: int) -> float:
    """Permute contenders within each pair, over the pairs of all tasks; tasks have equal weights."""
    weights = numpy.concatenate([numpy.full(len(task), 1 / (len(contender) * len(task))) for task in contender])

    def difference(mine: Array, other: Array, axis: int = -1) -> Array:
        weighted: Array = numpy.sum((mine - other) * weights, axis=axis)
        return weighted

    test = stats.permutation_test(
        (numpy.concatenate(contender), numpy.concatenate(reference)),
        difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=1000,
        rng=numpy.random.default_rng(_SEED),
    )
    return float(min(1.0, test.pvalue))


def _standard_error(samples: Sequence[Array]) -> float:
    """Return the standard error of the mean over tasks."""
    return float(numpy.sqrt(sum(numpy.var(sample, ddof=1) / len(sample) for sample in samples)) / len(samples))
