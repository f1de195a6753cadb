"""A study's folder with all its files, made in a second: real profiles and plans of a tiny model, invented scores."""

from __future__ import annotations

import random
from pathlib import Path

import torch

import apportion
from apportion.records.profile import Profile
from apportion.study.records import CellSummary, Comparison, Interval, Run, Score, Summary
from tiny_models import build_tiny

TASKS = ("siblings", "legs")
METHODS = {"hellora": {"hot": 3}, "cold": {"hot": 3}, "attention": {}, "lora": {}}
BUDGETS = (4, 8)  # ranks stand for budgets


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
    """Write summary, runs, profiles and plans of every task, method, budget and seed.

    Returns:
        The summary as written.
    """
    drawn = random.Random(0)
    runs, cells = [], []
    (folder / "runs").mkdir(parents=True)
    profile.save(folder / "profiles" / "tiny.safetensors")
    for task in profile.tasks:
        before = Score(loss=1.5, exact_match=0.2)
        for method, options in METHODS.items():
            for rank in BUDGETS:
                plan = apportion.plan(profile.of_task(task), method, rank=rank, **options)
                file = f"plans/{profile.tasks.index(task)}-{method}-{rank}.json"
                plan.save(folder / file)
                spent, base = plan.cost.trainable_parameters, 0.4 + 0.05 * rank - 0.1 * (method == "cold")
                for seed in range(seeds):
                    match = base + drawn.uniform(-0.04, 0.04)
                    run = Run(
                        key=f"{len(runs):04x}", model="tiny", task=task, contender=method, method=method,
                        options=plan.options, unit="parameters", budget=rank * 1000, spent=spent, rank=rank,
                        plan=file, seed=seed, lr=3e-3, before=before, after=Score(loss=1 - match, exact_match=match),
                        unrelated_before=Score(loss=0.4, exact_match=None),
                        unrelated_after=Score(loss=0.4 + drawn.uniform(0, 0.2), exact_match=None),
                        steps=60, tokens=12345, train_s=9.5 + drawn.random(), peak_bytes=700_000_000,
                        trainable_parameters=spent, hot_set_drift=drawn.uniform(0.7, 1), versions={"torch": "2.13.0"},
                    )  # fmt: skip
                    runs.append(run)
                cells.append(
                    CellSummary(
                        model="tiny", task=task, contender=method, budget=rank * 1000, spent=spent, seeds=seeds,
                        exact_match=_around(base, 0.03), loss=_around(1 - base, 0.03), forgetting=_around(0.1, 0.04),
                    )  # fmt: skip
                )
    for run in runs:
        (folder / "runs" / f"{run.key}.json").write_text(run.model_dump_json())
    summary = Summary(
        name="tiny placement", digest="0" * 64, unit="parameters", level=0.05, reference="hellora",
        planned_runs=len(runs), finished_runs=len(runs), cells=tuple(cells),
        comparisons=tuple(_comparison(cell) for cell in cells if cell.contender != "hellora"),
        verdicts=(
            "cold is worse than hellora at both budgets, by 0.100 exact match (0.062 to 0.138) on average.",
            "The data cannot tell hellora, attention and lora apart.",
        ),
        hot_set_stability={task: _around(0.9, 0.05) for task in profile.tasks},
        commands=("apportion compare study.toml -o tiny", "apportion report tiny -o report.html"),
    )  # fmt: skip
    (folder / "summary.json").write_text(summary.model_dump_json())
    return summary


def _around(estimate: float, half: float) -> Interval:
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half)


def _comparison(cell: CellSummary) -> Comparison:
    worse = cell.contender == "cold"
    return Comparison(
        model=cell.model, task=cell.task, budget=cell.budget, contender=cell.contender, reference="hellora",
        metric="exact_match", difference=_around(-0.1 if worse else 0.01, 0.04), p=0.001 if worse else 0.6,
        p_corrected=0.012 if worse else 1.0, smallest_effect=0.05, differs=worse,
    )  # fmt: skip
