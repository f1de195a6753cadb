"""The page's tables: text and sort key of each cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from apportion.records.placement import Placement, group_placements
from apportion.records.plan import Plan
from apportion.report.material import Material
from apportion.study.records import CellSummary, Comparison, Interval, Run, Summary, Trial

_NONE = "\N{EN DASH}"
_METRICS = {"exact_match": "exact match", "loss": "loss"}


@dataclass(frozen=True)
class Cell:
    """Text of a cell, and the number or text to sort by."""

    text: str
    key: float | str | None = None


@dataclass(frozen=True)
class Table:
    """A table with title, caption, column names and rows. The first column contains the row headers."""

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]

    @property
    def numeric(self) -> list[bool]:
        """Whether each column contains numbers."""
        return [any(isinstance(cell.key, int | float) for cell in cells) for cells in zip(*self.rows, strict=True)]


def result_tables(material: Material) -> list[Table]:
    """Return the tables of a page.

    Args:
        material: Contents of the page.

    Returns:
        The tables, in the page's order.
    """
    if material.study is not None:
        study, summary = material.study, material.study.summary
        summarised = [_stability(summary), _cells(summary), _comparisons(summary)] if summary else []
        return [table for table in (*summarised, _runs(study.runs), _trials(study.trials)) if table.rows]
    if material.demo is not None:
        return [_demo(material.demo)]
    return [_placements(plan) for plan in material.plans.values()]


def _stability(summary: Summary) -> Table:
    """Return how stable each task's hot set is under resampling of the calibration rows."""
    return Table(
        "Stability of the hot sets",
        "Mean Jaccard index of a task's hot sets over resamples of its calibration rows. 1: always the same experts.",
        ("task", "Jaccard index"),
        [[_text(task), _interval(index, 3)] for task, index in summary.hot_set_stability.items()],
    )


def _cells(summary: Summary) -> Table:
    """Return one row per contender, budget and task."""
    models = len({cell.model for cell in summary.cells}) > 1
    return _table(
        "Scores",
        "Means over seeds on held-out rows, with bootstrap intervals. Forgetting: loss on unrelated rows, after minus "
        "before training.",
        summary.cells,
        {
            **({"model": _model} if models else {}),
            "task": lambda cell: _text(cell.task),
            "contender": lambda cell: _text(cell.contender),
            f"budget ({summary.unit})": lambda cell: _number(cell.budget),
            "spent": lambda cell: _number(cell.spent),
            "seeds": lambda cell: _number(cell.seeds),
            "exact match": lambda cell: _interval(cell.exact_match, 3),
            "loss": lambda cell: _interval(cell.loss, 3),
            "forgetting": lambda cell: _interval(cell.forgetting, 3),
        },
    )


def _comparisons(summary: Summary) -> Table:
    """Return one row per paired comparison."""
    models = len({comparison.model for comparison in summary.comparisons}) > 1
    return _table(
        f"Differences from {summary.reference}",
        f"Paired differences, contender minus reference, with bootstrap intervals. p: permutation test, uncorrected "
        f"and corrected for all comparisons (level {summary.level:g}). Smallest effect: the smallest difference that "
        "this design detects with 80 % power.",
        summary.comparisons,
        {
            **({"model": _model} if models else {}),
            "task": lambda one: _text(one.task),
            "contender": lambda one: _text(one.contender),
            "budget": lambda one: _number(one.budget),
            "metric": lambda one: _text(_METRICS[one.metric]),
            "difference": lambda one: _interval(one.difference, 3, sign="+"),
            "p": lambda one: _number(one.p, ".4f"),
            "p corrected": lambda one: _number(one.p_corrected, ".4f"),
            "runs": lambda one: _number(one.runs),
            "smallest effect": lambda one: _number(one.smallest_effect, ".3f"),
            "differs": lambda one: _text("yes" if one.differs else "cannot tell"),
        },
    )


def _runs(runs: tuple[Run, ...]) -> Table:
    """Return one row per run."""
    return _table(
        "Runs",
        "Every run, with its settings, cost and scores.",
        runs,
        {
            **({"model": _model} if len({run.model for run in runs}) > 1 else {}),
            "task": lambda run: _text(run.task),
            "contender": lambda run: _text(run.contender),
            "budget": lambda run: _number(run.budget),
            "spent": lambda run: _number(run.spent),
            "seed": lambda run: _number(run.seed),
            "learning rate": lambda run: _number(run.lr, ".3g"),
            "exact match before": lambda run: _number(run.before.exact_match, ".3f"),
            "after": lambda run: _number(run.after.exact_match, ".3f"),
            "loss before": lambda run: _number(run.before.loss, ".3f"),
            "loss after": lambda run: _number(run.after.loss, ".3f"),
            "forgetting": lambda run: _number(_forgetting(run), "+.3f"),
            "hot-set drift": lambda run: _number(run.hot_set_drift, ".3f"),
            "rank": lambda run: _number(run.rank),
            "trained parameters": lambda run: _number(run.trainable_parameters),
            "steps": lambda run: _number(run.steps),
            "tokens": lambda run: _number(run.tokens),
            "time, s": lambda run: _number(run.train_s, ",.1f"),
            "peak memory, MB": lambda run: _number(run.peak_bytes / 1e6, ",.0f"),
            "versions": lambda run: _text(", ".join(f"{name} {number}" for name, number in run.versions.items())),
            "run": lambda run: _text(run.key),
        },
    )


def _trials(trials: tuple[Trial, ...]) -> Table:
    """Return one row per learning rate tried."""
    return _table(
        "Learning rates tried",
        "Learning rates were chosen by the loss on rows and a seed that are not used for scores.",
        trials,
        {
            **({"model": _model} if len({trial.model for trial in trials}) > 1 else {}),
            "task": lambda trial: _text(trial.task),
            "contender": lambda trial: _text(trial.contender),
            "budget": lambda trial: _number(trial.budget),
            "learning rate": lambda trial: _number(trial.lr, ".3g"),
            "loss": lambda trial: _number(trial.loss, ".3f"),
            "time, s": lambda trial: _number(trial.train_s, ",.1f"),
        },
    )


def _demo(results: dict[str, Any]) -> Table:
    """Return one row per task and method."""
    return _table(
        "Runs",
        "One run per task and method: too few to detect small differences between methods.",
        results["runs"],
        {
            "task": lambda run: _text(run["task"]),
            "method": lambda run: _text(run["method"]),
            "trained parameters": lambda run: _number(run["cost"]["trainable_parameters"]),
            "of LoRA": lambda run: _number(run["cost"]["lora_count_ratio"], ".1%"),
            "adapter FLOPs per token": lambda run: _number(run["cost"]["adapter_flops_per_token"]),
            "exact match before": lambda run: _number(run["before"]["exact_match"], ".3f"),
            "after": lambda run: _number(run["after"]["exact_match"], ".3f"),
            "unrelated loss before": lambda run: _number(run["unrelated_before"]["loss"], ".3f"),
            "unrelated loss after": lambda run: _number(run["unrelated_after"]["loss"], ".3f"),
            "tokens": lambda run: _number(run["training"]["tokens"]),
            "time, s": lambda run: _number(run["training"]["seconds"], ",.1f"),
        },
    )


def _placements(plan: Plan) -> Table:
    """Return one row per pattern of sites."""
    groups = group_placements(plan.placements)
    rows = [(Placement(pattern, group.shape), pattern) for group in groups for pattern in group.sites]
    return _table(
        "Adapters",
        "The matrices with an adapter. Braces list alternatives.",
        rows,
        {
            "matrices": lambda row: _text(row[1]),
            "rank": lambda row: _number(row[0].rank),
            "alpha": lambda row: _number(row[0].alpha, "g"),
            "LoRA experts": lambda row: _number(row[0].num_experts),
            "used per token": lambda row: _number(row[0].top_k),
            "sparsity": lambda row: _number(row[0].sparsity, ".0%"),
        },
    )


def _table(title: str, caption: str, items: Iterable[Any], columns: dict[str, Callable[[Any], Cell]]) -> Table:
    """Build a table from one function per column."""
    return Table(title, caption, tuple(columns), [[fill(item) for fill in columns.values()] for item in items])


def _model(item: CellSummary | Comparison | Run | Trial) -> Cell:
    """Return the name of the model."""
    return _text(item.model)


def _forgetting(run: Run) -> float | None:
    """Return the increase of the loss on unrelated rows."""
    if run.unrelated_before is None or run.unrelated_after is None:
        return None
    return run.unrelated_after.loss - run.unrelated_before.loss


def _text(text: str) -> Cell:
    """Return a cell with text, sorted alphabetically."""
    return Cell(text, text)


def _number(value: float | None, form: str = ",.0f") -> Cell:
    """Return a cell with a number, sorted by its value."""
    return Cell(_NONE) if value is None else Cell(_signed(format(value, form)), value)


def _interval(interval: Interval | None, digits: int, sign: str = "") -> Cell:
    """Return a cell with an estimate and its interval, sorted by the estimate."""
    if interval is None:
        return Cell(_NONE)
    form = f"{sign}.{digits}f"
    low, high = _signed(format(interval.low, form)), _signed(format(interval.high, form))
    return Cell(f"{_signed(format(interval.estimate, form))} ({low} to {high})", interval.estimate)


def _signed(text: str) -> str:
    """Replace hyphens by minus signs."""
    return text.replace("-", "\N{MINUS SIGN}")
