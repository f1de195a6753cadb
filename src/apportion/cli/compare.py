"""`apportion compare`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from apportion.cli.quiet import quiet
from apportion.cli.terminal import Terminal, as_text
from apportion.errors import ConfigurationError, MissingDependencyError

try:
    from apportion.study.matrix import run_study, write_summary
    from apportion.study.page import write_page
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "scipy"):
        raise
    raise MissingDependencyError("comparisons", package=str(error.name), extra="study") from error
from apportion.data.sources import named_sources
from apportion.records.outputs import check_output
from apportion.study.records import Interval, Summary
from apportion.study.settings import StudySettings, check_settings, load_settings
from apportion.study.sitting import Sitting


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    study: Path | None
    output: Path | None
    options: dict[str, Any]
    data: list[str] | None
    sitting: dict[str, Any]
    page: Path | None
    force: bool


def run(console: Terminal, args: Arguments) -> dict[str, Any]:
    """Run a study or summarise a study's folder, and show the summary."""
    quiet()
    _check_page(
        args.page, [*([args.study] if args.study else []), *named_sources(args.data or []).values()], force=args.force
    )
    if args.study is not None and args.study.is_dir():
        unused = [
            *args.options,
            *(["data"] if args.data else []),
            *(["output"] if args.output else []),
            *(["dry_run"] if args.sitting["dry_run"] else []),
        ]
        if unused:
            raise ConfigurationError(
                f"{unused[0]} cannot be used with {args.study}: a study's folder is only summarised.",
                fix=f"give the study's .toml file, or drop {unused[0]}",
            )
        summary: Summary | None = write_summary(args.study, say=lambda text: console.print(text, soft_wrap=True))
        folder = args.study
    else:
        settings = _settings(args.study, args.data, args.options)
        folder = args.output or Path("build") / settings.name
        with console.status("starting") as status:
            how = Sitting(**args.sitting, say=lambda text: _say(console, status, text), prepare=quiet)
            summary = run_study(folder, settings, _commands(args.study, args.data, args.options, folder), how)
    if summary is None:
        return {"folder": str(folder), "dry_run": True}
    console.print(cells_table(summary))
    for sentence in summary.verdicts:
        console.print(f"- {sentence}")
    console.print(f"settings, runs and summary -> {folder}")
    if args.page:
        write_page(folder, args.page)
        console.print(f"page -> {args.page}")
    return summary.model_dump(mode="json") | {"folder": str(folder)}


def _check_page(page: Path | None, inputs: list[Path | str], *, force: bool) -> None:
    """Check that the page and the files that `write_page` puts next to it overwrite no other files."""
    if page is None:
        return
    check_output(page, "study page", inputs=inputs, force=force)
    check_output(page.with_suffix(".json"), "study data", inputs=inputs, force=force)
    for plot in ("score", "forgetting"):
        check_output(page.with_name(f"{page.stem}-{plot}.svg"), "picture", inputs=inputs, force=force)


def cells_table(summary: Summary) -> Table:
    """Return the scores of every contender, task and budget.

    Args:
        summary: Summary of a study.

    Returns:
        The table.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("task", "contender"):
        table.add_column(name)
    for name in ("budget", "spent", "seeds", "exact match", "loss", "forgetting"):
        table.add_column(name, justify="right")
    for cell in summary.cells:
        scores = (_interval(one) for one in (cell.exact_match, cell.loss, cell.forgetting))
        table.add_row(cell.task, cell.contender, f"{cell.budget:,}", f"{cell.spent:,}", str(cell.seeds), *scores)
    return table


def _interval(interval: Interval | None) -> str:
    """Format an estimate with its interval."""
    return "" if interval is None else f"{interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _settings(study: Path | None, data: list[str] | None, options: dict[str, Any]) -> StudySettings:
    """Load the study file with its overrides, or make a study from options only."""
    if study is not None:
        if data:
            raise ConfigurationError("a study file and --data were both given.", fix="name the data in the study file")
        return load_settings(study, options)
    missing = [name for name, given in (("--data", data), ("--method", "contenders" in options),
                                        ("--budget", "budgets" in options)) if not given]  # fmt: skip
    if missing:
        raise ConfigurationError(
            f"without a study file, {' and '.join(missing)} must be given.",
            fix="give a STUDY.toml, or --data, --method and --budget",
        )
    return check_settings({"name": "comparison", "tasks": named_sources(data or [])}, options)


def _commands(study: Path | None, data: list[str] | None, options: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """Return the commands that run the same study again."""
    words = ["apportion", "compare", *([str(study)] if study else [])]
    words += [word for source in data or [] for word in ("--data", source)]
    names = {"models": "model", "contenders": "method", "budgets": "budget", "training.steps": "steps"}
    names |= {"training.batch_size": "batch-size", "tuning.trials": "trials", "eval_rows": "eval-rows"}
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{names.get(name, name)}", str(one)]
    return shlex.join([*words, "-o", str(folder)]), f"apportion report {folder} -o {folder / 'report.html'}"


def _say(console: Terminal, status: Any, text: str) -> None:
    """Show progress: runs next to a spinner on a terminal, every line otherwise."""
    status.update(as_text(text))
    if not console.is_terminal or not text.startswith(("run ", "trial ")):
        console.print(text, soft_wrap=True)
