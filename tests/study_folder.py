"""A study's folder with all its files, made in a second: real profiles and plans of a tiny model, invented scores."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

import apportion
from apportion.records.profile import Profile
from apportion.study.contents import profile_key
from apportion.study.files import keep_plan, profile_path, write_record
from apportion.study.note import note_runs, note_trials, open_study
from apportion.study.records import CellSummary, Comparison, Contents, Interval, Run, Score, Summary, TaskDigests, Trial
from apportion.study.settings import StudySettings
from tiny_models import build_tiny

TASKS = ("siblings", "legs")
METHODS: dict[str, dict[str, Any]] = {
    "hellora": {"hot": 3},
    "cold": {"hot": 3},
    "attention": {},
    "lora": {},
    "full": {},
}
BUDGETS = (4, 8)  # ranks stand for budgets
VERSIONS = {"torch": "2.13.0"}


def tiny_profile(tasks: tuple[str, ...] = TASKS, name: str = "olmoe", **changes: int) -> Profile:
    """Profile a tiny model with sensitivities, on random tokens that differ by task."""
    model = build_tiny(name, **changes)
    streams = {}
    for number, task in enumerate(tasks):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3 + 20 * number, 24 + 20 * number, (4, 12), generator=generator)
        streams[task] = [{"input_ids": ids, "labels": ids}]
    return apportion.profile(model, streams, sensitivity=True)


def write_study(folder: Path, profile: Profile, seeds: int = 3) -> Summary:
    """Write settings, summary, runs, profile and plans of every task, method, budget and seed.

    Returns:
        The summary as written.
    """
    settings = StudySettings(
        name="tiny placement",
        models=("tiny",),
        tasks={task: f"{task}.jsonl" for task in profile.tasks},
        contenders=[{"method": method, **options} for method, options in METHODS.items()],
        reference="hellora",
        budgets=tuple(rank * 1000 for rank in BUDGETS),
        seeds=seeds,
    )
    rows = {task: TaskDigests(train="0", validation="1", held_out="2") for task in profile.tasks}
    contents = Contents(tasks=rows, unrelated=None, weights={"tiny": "3"})
    open_study(folder, settings, contents, VERSIONS)
    profile.save(profile_path(folder, profile_key(settings, contents, VERSIONS, "tiny")))
    drawn = random.Random(0)
    runs, cells = [], []
    for task in profile.tasks:
        for method in METHODS:
            for rank in BUDGETS if method != "full" else (0,):
                cell, own = _cell(folder, profile, task, method, rank, range(len(runs), len(runs) + seeds), drawn)
                cells.append(cell)
                runs += own
    for run in runs:
        write_record(folder / "runs" / f"{run.key}.json", run)
    note_runs(folder, [run.key for run in runs])
    note_trials(folder, ["ab"])
    trial = Trial(
        key="ab", model="tiny", task=profile.tasks[0], contender="cold", budget=4000, lr=1e-3, loss=None, train_s=2.5
    )
    write_record(folder / "tuning" / "ab.json", trial)
    summary = Summary(
        name=settings.name, digest=settings.digest, unit="parameters", level=0.05, reference="hellora",
        planned_runs=len(runs), finished_runs=len(runs), cells=tuple(cells),
        comparisons=tuple(_comparison(cell) for cell in cells if cell.contender != "hellora"),
        verdicts=(
            "cold is worse than hellora at both budgets, by 0.100 exact match (0.062 to 0.138) on average.",
            "The data cannot tell hellora, attention, lora and full apart.",
        ),
        hot_set_stability={task: _around(0.9, 0.05) for task in profile.tasks},
        commands=("apportion compare study.toml -o tiny", "apportion report tiny -o report.html"),
    )  # fmt: skip
    write_record(folder / "summary.json", summary)
    return summary


def _cell(
    folder: Path, profile: Profile, task: str, method: str, rank: int, numbers: range, drawn: random.Random
) -> tuple[CellSummary, list[Run]]:
    """Plan, and invent the scores of one contender at one budget on one task."""
    file = plan_seal = None
    spent = budget = profile.layout.base_parameters
    options = {}
    if method != "full":
        plan = apportion.plan(profile.of_task(task), method, rank=rank, **METHODS[method])
        file, plan_seal = keep_plan(folder, plan)
        spent, budget, options = plan.cost.trainable_parameters, rank * 1000, plan.options
    base = 0.4 + 0.05 * rank - 0.1 * (method == "cold") + 0.5 * (method == "full")
    runs = []
    for seed, number in enumerate(numbers):
        match = base + drawn.uniform(-0.04, 0.04)
        run = Run(
            key=f"{number:04x}", model="tiny", task=task, contender=method, method=method, options=options,
            unit="parameters", budget=budget, spent=spent, rank=rank or None, plan=file, plan_seal=plan_seal,
            seed=seed, lr=3e-3, before=Score(loss=1.5, exact_match=0.2), after=Score(loss=1 - match, exact_match=match),
            unrelated_before=Score(loss=0.4, exact_match=None),
            unrelated_after=Score(loss=0.4 + drawn.uniform(0, 0.2), exact_match=None), steps=60, tokens=12345,
            train_s=9.5 + drawn.random(), peak_bytes=700_000_000, trainable_parameters=spent,
            hot_set_drift=drawn.uniform(0.7, 1), versions=VERSIONS,
        )  # fmt: skip
        runs.append(run)
    cell = CellSummary(
        model="tiny", task=task, contender=method, budget=budget, spent=spent, seeds=len(runs),
        exact_match=_around(base, 0.03), loss=_around(1 - base, 0.03), forgetting=_around(0.1, 0.04),
    )  # fmt: skip
    return cell, runs


def _around(estimate: float, half: float) -> Interval:
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half)


def _comparison(cell: CellSummary) -> Comparison:
    worse = cell.contender == "cold"
    return Comparison(
        model=cell.model, task="all", budget=cell.budget, contender=cell.contender, reference="hellora", runs=6,
        metric="exact_match", difference=_around(-0.1 if worse else 0.01, 0.04), p=0.001 if worse else 0.6,
        p_corrected=0.012 if worse else 1.0, smallest_effect=0.05 if worse else None, differs=worse,
    )  # fmt: skip
