"""Compute ``summary.json`` from a study's runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy

from apportion.study.records import CellSummary, Comparison, Interval, Metric, Run, Score, Summary
from apportion.study.settings import FULL, StudySettings
from apportion.study.statistics import Array, compare, corrected, interval
from apportion.study.store import StoredStudy
from apportion.study.verdict import verdicts


def summarise(study: StoredStudy, commands: tuple[str, ...]) -> Summary:
    """Summarise a study's finished runs. Comparisons need all runs.

    Args:
        study: The study's folder, as read.
        commands: Commands that reproduce the study.

    Returns:
        The summary.
    """
    settings, runs = study.settings, study.runs
    planned = settings.planned_runs
    comparisons = _compare_all(settings, runs) if len(runs) == planned else []
    cells = [
        _cell(settings, list(part))
        for _, part in itertools.groupby(runs, key=lambda run: (run.model, run.task, run.contender, run.budget))
    ]
    stability = {
        task if len(settings.models) == 1 else f"{base.model}: {task}": overlap
        for base in study.bases.values()
        for task, overlap in base.stability.items()
    }
    return Summary(
        name=settings.name,
        digest=settings.digest,
        unit=settings.unit,
        level=settings.level,
        reference=settings.reference,
        planned_runs=planned,
        finished_runs=len(runs),
        cells=tuple(cells),
        comparisons=tuple(comparisons),
        verdicts=verdicts(settings, comparisons, len(runs), planned),
        hot_set_stability=stability,
        commands=commands,
    )


def _cell(settings: StudySettings, runs: Sequence[Run]) -> CellSummary:
    """Summarise the seeds of one contender at one budget on one task."""

    def mean(values: Array) -> Interval:
        return interval([values], settings.level, settings.resamples)

    first = runs[0]
    forgetting = [
        run.unrelated_after.loss - run.unrelated_before.loss
        for run in runs
        if run.unrelated_after and run.unrelated_before
    ]
    return CellSummary(
        model=first.model,
        task=first.task,
        contender=first.contender,
        budget=first.budget,
        spent=round(float(numpy.mean([run.spent for run in runs]))),
        seeds=len(runs),
        exact_match=mean(_scores(runs, "exact_match")) if first.after.items else None,
        loss=mean(_scores(runs, "loss")),
        forgetting=mean(numpy.array(forgetting)[:, None]) if forgetting else None,
    )


def _compare_all(settings: StudySettings, runs: Sequence[Run]) -> list[Comparison]:
    """Compare every contender with the reference at each of the reference's budgets, and correct p values."""
    table = {(run.model, run.contender, run.budget, run.task, run.seed): run for run in runs}
    places = []
    for model in settings.models:
        budgets = sorted({run.budget for run in runs if run.contender == settings.reference and run.model == model})
        for budget in budgets:
            for contender in settings.contenders:
                # full fine-tuning has no budget: compare it once, with the reference at its largest
                again = contender.method == FULL and budget != budgets[-1]
                if contender.name != settings.reference and not again:
                    places.append((model, budget, contender))
    tests = []
    for model, budget, contender in places:
        mine, other = [], []
        budgets = [run.budget for run in runs if run.contender == contender.name and run.model == model]
        at = budgets[0] if contender.method == FULL and budgets else budget
        for task in settings.tasks:
            mine.append([table[model, contender.name, at, task, seed] for seed in range(settings.seeds)])
            other.append([table[model, settings.reference, budget, task, seed] for seed in range(settings.seeds)])
        test = compare(
            [_scores(task, settings.metric) for task in mine],
            [_scores(task, settings.metric) for task in other],
            level=settings.level,
            comparisons=len(places),
            resamples=settings.resamples,
        )
        tests.append((model, budget, contender.name, sum(map(len, mine)), test))
    p_corrected = corrected([test.p for *_, test in tests])
    return [
        Comparison(
            model=model,
            task="all",
            budget=budget,
            contender=contender,
            reference=settings.reference,
            metric=settings.metric,
            runs=num_runs,
            difference=test.difference,
            p=test.p,
            p_corrected=p,
            smallest_effect=test.smallest_effect,
            differs=p <= settings.level,
        )
        for (model, budget, contender, num_runs, test), p in zip(tests, p_corrected, strict=True)
    ]


def _scores(runs: Sequence[Run], metric: Metric) -> Array:
    """Return a task's scores: a row a run, and for exact match a column an item."""
    after: list[Score] = [run.after for run in runs]
    return numpy.array([score.items if metric == "exact_match" else [score.loss] for score in after], dtype=float)
