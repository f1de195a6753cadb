"""Write a study as a Markdown page with plots and one JSON file, from the study's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from apportion.records.files import whole_file, write_text
from apportion.study.records import CellSummary, Comparison, Interval, Run, Summary
from apportion.study.settings import FULL
from apportion.study.store import StoredStudy, load_study

_UNITS = {"parameters": "trainable parameters", "flops": "adapter FLOPs per token"}


def write_page(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write a study's results: the page, and next to it ``.json`` and ``-*.svg`` files with the page's name.

    Args:
        folder: Folder of a study that has a summary.
        path: The page, a ``.md`` file.

    Raises:
        ConfigurationError: the folder holds no study.
    """
    study, page = load_study(folder), Path(path)
    if study.summary is None:
        return
    plots = {f"{page.stem}-{metric}.svg": metric for metric in ("score", "forgetting")}
    for name, metric in plots.items():
        _draw(study, study.summary, metric, page.with_name(name))
    write_text(page.with_suffix(".json"), _data(study, study.summary))
    write_text(page, "\n".join(_lines(study, study.summary, page)) + "\n")


def _data(study: StoredStudy, summary: Summary) -> str:
    """Return all numbers of the page, and the runs they are computed from, as JSON."""
    data = {
        "settings": study.settings.model_dump(mode="json"),
        "versions": study.versions,
        "summary": summary.model_dump(mode="json"),
        "bases": [base.model_dump(mode="json") for base in study.bases.values()],
        "trials": [trial.model_dump(mode="json") for trial in study.trials],
        "runs": [run.model_dump(mode="json", exclude={"versions", "before", "unrelated_before"}) for run in study.runs],
    }
    parts = []
    for name, value in data.items():
        rows = ",\n".join(json.dumps(one) for one in value) if isinstance(value, list) else None
        parts.append(f'"{name}": ' + (json.dumps(value) if rows is None else f"[\n{rows}\n]"))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _lines(study: StoredStudy, summary: Summary, page: Path) -> Iterable[str]:
    """Yield the lines of the page."""
    settings = study.settings
    training = settings.training
    yield f"# Study: {settings.name}"
    yield ""
    yield (
        f"{summary.finished_runs} of {summary.planned_runs} runs: {', '.join(settings.models)}; "
        f"{len(settings.tasks)} tasks, {len(settings.contenders)} contenders, {len(settings.budgets)} budgets, "
        f"{settings.seeds} seeds. A run is {training.steps} steps of {training.batch_size} rows and is scored on "
        f"{settings.eval_rows} held-out rows. Every number below is computed from the runs in "
        f"[{page.stem}.json]({page.stem}.json)."
    )
    yield ""
    yield from (f"- *{task}*: `{source}`" for task, source in settings.tasks.items())
    if settings.unrelated:
        yield f"- *unrelated*: `{settings.unrelated}`; the rise of its loss is what was forgotten"
    yield from ("", "## Verdict", "", f"**{summary.verdicts[0]}**", "")
    yield from (f"- {sentence}" for sentence in summary.verdicts[1:])
    if summary.comparisons:
        yield from ("", "## Comparisons", "", *_comparison_table(summary.comparisons), "")
        yield (
            "Differences are paired by task and seed, the contender's minus the reference's, and averaged over tasks. "
            "The interval is the wider one of a bootstrap over runs and one over items; *p* is the larger one of a "
            "permutation test over runs and one over items, so that a difference has to hold over both; *corrected* "
            f"is after Benjamini and Hochberg over all {len(summary.comparisons)} comparisons; *smallest* is the "
            "difference that this design sees with a power of 80 % after a correction for all comparisons. Learning "
            "rates are taken as chosen."
        )
    for budget in sorted({cell.budget for cell in summary.cells if not _is_full(study, cell.contender)}):
        cells = [cell for cell in summary.cells if cell.budget == budget or _is_full(study, cell.contender)]
        yield from ("", f"## {budget:,} {_UNITS[settings.unit]}", "", *_cell_table(study, cells))
    yield from ("", f"![Score by budget]({page.stem}-score.svg)", "", f"![Forgetting]({page.stem}-forgetting.svg)", "")
    yield from ("## Learning rates", "", *_rate_table(study), "")
    yield (
        f"Tried on seed {settings.tuning.seed}, {settings.tuning.trials} for each contender, and chosen by the loss on "
        "training rows that no run trains on. A rate at the edge of what was tried is marked: a better one may lie "
        "beyond."
    )
    yield from ("", "## Hot sets", "", *_stability_table(study, summary), "")
    yield (
        f"The hottest {settings.profile.hot} of a layer's experts. *resamples*: mean Jaccard index between the hot set "
        "of the calibration rows and that of rows drawn again from them, with the middle 95 % of the resamples; "
        "*before and after*: between the base model's hot set and the trained one's, the mean over runs and the lowest."
    )
    yield from ("", "## How to get this again", "")
    yield from (f"- `{command}`" for command in summary.commands)
    seconds = sum(run.train_s for run in study.runs) + sum(trial.train_s for trial in study.trials)
    yield f"- {seconds / 3600:.1f} hours of training, added up over processes"
    yield f"- {', '.join(f'{name} {version}' for name, version in study.versions.items())}"


def _comparison_table(comparisons: Sequence[Comparison]) -> Iterable[str]:
    """List every comparison with its numbers."""
    yield "| budget | contender | minus | difference | p | corrected | smallest | verdict |"
    yield "| ---: | --- | --- | ---: | ---: | ---: | ---: | --- |"
    for one in comparisons:
        smallest = "none" if one.smallest_effect is None else f"{one.smallest_effect:.3f}"
        better = (one.difference.estimate > 0) == (one.metric == "exact_match")
        verdict = ("better" if better else "worse") if one.differs else "cannot tell"
        yield (
            f"| {one.budget:,} | `{one.contender}` | `{one.reference}` | {_interval(one.difference, signed=True)} | "
            f"{one.p:.4f} | {one.p_corrected:.4f} | {smallest} | {verdict} |"
        )


def _cell_table(study: StoredStudy, cells: Sequence[CellSummary]) -> Iterable[str]:
    """List the contenders at one budget, task by task."""
    yield "| task | contender | spent | rank | exact match | loss | forgetting | train s | peak MB |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    seen: set[tuple[str, str]] = set()
    for cell in cells:
        if (cell.model, cell.task) not in seen:
            seen.add((cell.model, cell.task))
            before = study.bases[cell.model].before[cell.task]
            match = "" if before.exact_match is None else f"{before.exact_match:.3f}"
            model = f" {cell.model}" if len(study.settings.models) > 1 else ""
            yield f"| {cell.task}{model} | (before) | | | {match} | {before.loss:.3f} | | | |"
        runs = _runs_of(study, cell)
        note = " (all weights, no budget)" if _is_full(study, cell.contender) else ""
        rank = "" if runs[0].rank is None else str(runs[0].rank)
        train_s = sum(run.train_s for run in runs) / len(runs)
        peak = max(run.peak_bytes for run in runs) / 1e6
        scores = " | ".join(_interval(one) for one in (cell.exact_match, cell.loss, cell.forgetting))
        yield f"| | `{cell.contender}`{note} | {cell.spent:,} | {rank} | {scores} | {train_s:.1f} | {peak:,.0f} |"


def _rate_table(study: StoredStudy) -> Iterable[str]:
    """List the learning rates tried and chosen."""
    yield "| model | task | contender | budget | tried: loss | chosen |"
    yield "| --- | --- | --- | ---: | --- | ---: |"
    groups: dict[tuple[str, str, str, int], dict[float, float | None]] = {}
    for trial in study.trials:
        groups.setdefault((trial.model, trial.task, trial.contender, trial.budget), {})[trial.lr] = trial.loss
    for (model, task, contender, budget), losses in groups.items():
        tried = ", ".join(f"{lr:g}: {'diverged' if loss is None else f'{loss:.3f}'}" for lr, loss in losses.items())
        known = {lr: loss for lr, loss in losses.items() if loss is not None}
        best = min(known, key=lambda lr: known[lr]) if known else None
        edge = " (edge)" if len(losses) > 1 and best in (min(losses), max(losses)) else ""
        chosen = "none" if best is None else f"{best:g}{edge}"
        yield f"| {model} | {task} | `{contender}` | {budget:,} | {tried} | {chosen} |"


def _stability_table(study: StoredStudy, summary: Summary) -> Iterable[str]:
    """Tabulate how much hot sets change with the calibration rows and with training."""
    yield "| task | resamples | before and after |"
    yield "| --- | ---: | ---: |"
    for task, found in summary.hot_set_stability.items():
        drifts = [run.hot_set_drift for run in study.runs if task.endswith(run.task) and run.hot_set_drift is not None]
        moved = f"{sum(drifts) / len(drifts):.3f}, lowest {min(drifts):.3f}" if drifts else ""
        yield f"| {task} | {_interval(found)} | {moved} |"


def _draw(study: StoredStudy, summary: Summary, metric: str, path: Path) -> None:
    """Plot scores over budgets with intervals, one panel per task. Full fine-tuning is a horizontal line."""
    panels = list(dict.fromkeys((cell.model, cell.task) for cell in summary.cells))
    with mpl.rc_context({"svg.hashsalt": study.settings.name, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(4.5 * max(1, len(panels)) + 1.5, 4), layout="constrained")
        for number, (model, task) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), number + 1)
            for place, contender in enumerate(study.settings.contenders):
                cells = [c for c in summary.cells if (c.model, c.task, c.contender) == (model, task, contender.name)]
                found = [(cell, _plotted(study, cell, metric)) for cell in cells]
                drawn = [(cell, one) for cell, one in found if one is not None]
                color, shift = f"C{place % 10}", 1 + 0.02 * (place - len(study.settings.contenders) / 2)
                if contender.method == FULL and drawn:
                    axes.axhline(
                        drawn[0][1].estimate, color=color, linestyle=":", label=f"{contender.name} (no budget)"
                    )
                elif drawn:
                    axes.errorbar(
                        [cell.spent * shift for cell, _ in drawn],
                        [one.estimate for _, one in drawn],
                        yerr=[
                            [max(0.0, one.estimate - one.low) for _, one in drawn],
                            [max(0.0, one.high - one.estimate) for _, one in drawn],
                        ],
                        color=color,
                        marker="os^Dv<>P"[place % 8],
                        markersize=4,
                        linewidth=1,
                        label=contender.name,
                    )
            axes.set_xscale("log")
            axes.set_xlabel(_UNITS[study.settings.unit])
            axes.set_title(f"{model}: {task}")
            axes.grid(alpha=0.3)
            if number == 0:
                axes.set_ylabel(_axis(study, metric))
            if number == len(panels) - 1:
                axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _plotted(study: StoredStudy, cell: CellSummary, metric: str) -> Interval | None:
    """Return the plotted value of a cell."""
    if metric == "forgetting":
        return cell.forgetting
    return cell.exact_match if study.settings.metric == "exact_match" else cell.loss


def _axis(study: StoredStudy, metric: str) -> str:
    """Return the label of the vertical axis."""
    if metric == "forgetting":
        return "rise of the unrelated loss, nats"
    return "exact match" if study.settings.metric == "exact_match" else "loss, nats"


def _is_full(study: StoredStudy, contender: str) -> bool:
    """Return whether a contender is full fine-tuning, which has no budget."""
    return study.settings.contender(contender).method == FULL


def _runs_of(study: StoredStudy, cell: CellSummary) -> list[Run]:
    """Return the runs of a cell."""
    place = (cell.model, cell.task, cell.contender, cell.budget)
    return [run for run in study.runs if (run.model, run.task, run.contender, run.budget) == place]


def _interval(found: Interval | None, *, signed: bool = False) -> str:
    """Format an estimate with its interval."""
    if found is None:
        return ""
    style = "+.3f" if signed else ".3f"
    return f"{found.estimate:{style}} ({found.low:{style}} to {found.high:{style}})"
