"""The demonstration: train and evaluate five placements on the embedded model."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apportion._version import __version__
from apportion.data.batches import batches, encode
from apportion.data.sources import Row, read_rows
from apportion.errors import ConfigurationError, OutputExistsError
from apportion.evaluation import Evaluation, evaluate
from apportion.loading import embedded
from apportion.methods.planning import plan
from apportion.profiling.run import profile
from apportion.records.demonstration import read_run
from apportion.records.files import seal, write_text
from apportion.records.json_file import read_json
from apportion.records.outputs import DEMO_RESULTS_FILE, check_output_folder
from apportion.records.profile import Profile
from apportion.signals import end_by
from apportion.training.settings import TrainSettings
from apportion.training.sft import train

TABLE_FILE = "results.md"
SETTINGS_FILE = "settings.json"
METHODS: tuple[str, ...] = ("lora", "attention", "hellora", "random", "cold")


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demonstration.

    Args:
        tasks: The tasks to fine-tune on, by name.
        unrelated: The task whose loss measures forgetting.
        hot: Experts kept per layer, of 16.
        rank: Rank of every adapter.
        profile_rows: Number of training rows for the profile.
        eval_rows: Held-out rows per evaluation.
        steps: Optimizer steps per run.
        batch_size: Rows per step.
        lr: Peak learning rate, the same for every method.
        seed: Seed of data, initial values and row order.
    """

    tasks: dict[str, str] = field(
        default_factory=lambda: {
            "siblings": "task:aiw",
            "legs": "task:leg_counting?min_animals=1&max_animals=1&max_instances=20",
        }
    )
    unrelated: str = "task:sentence_reordering?max_words_in_sentence=6"
    hot: int = 4
    rank: int = 16
    profile_rows: int = 256
    eval_rows: int = 500
    steps: int = 60
    batch_size: int = 32
    lr: float = 5e-3
    seed: int = 0


QUICK = DemoSettings(profile_rows=64, eval_rows=100, steps=10)


@dataclass(frozen=True)
class DemoRun:
    """One method on one task: its cost, its scores and its speed."""

    task: str
    method: str
    cost: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    unrelated_before: dict[str, Any]
    unrelated_after: dict[str, Any]
    training: dict[str, Any]


@dataclass(frozen=True)
class DemoResult:
    """Results of the demonstration.

    Args:
        settings: The settings.
        profile: The profile of all tasks.
        runs: One entry per task and method.
    """

    settings: DemoSettings
    profile: Profile
    runs: list[DemoRun]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "settings": asdict(self.settings),
            "versions": self.profile.provenance["versions"],
            "tokens_profiled": self.profile.tokens,
            "runs": [asdict(run) for run in self.runs],
        }


def run_demo(
    output: str | os.PathLike[str], settings: DemoSettings, report: Callable[[str], object] = str
) -> DemoResult:
    """Profile the embedded model, then train and evaluate all methods on all tasks with equal data, steps and seed.

    A run that a previous call with the same settings finished in the folder is not repeated.

    Args:
        output: Folder for the profile, the plans, the adapters, ``results.json`` and ``results.md``.
        settings: The settings.
        report: Called with progress messages.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        OutputExistsError: the folder has other files, or a demonstration with other settings.
        OutputPathError: nothing can be written there.
    """
    check_output_folder(output, may_hold=True)
    folder = _open(Path(output), settings)
    base, tokenizer = embedded()
    report("profiling the embedded model")
    measured = _profile(base, tokenizer, settings)
    measured.save(folder / "profile.safetensors")
    unrelated_rows = _held_out(settings.unrelated, settings)
    report("scoring the base model")
    unrelated_before = evaluate(base, tokenizer, unrelated_rows, batch_size=64)
    runs = []
    for task, source in settings.tasks.items():
        rows = _held_out(source, settings)
        before = evaluate(base, tokenizer, rows, batch_size=64)
        for method in METHODS:
            place = folder / task / method
            if not (place / "result.json").is_file():
                report(f"{task}: training {method}")
                trained, facts = _train(base, tokenizer, measured, task, method, place, settings)
                after = evaluate(trained, tokenizer, rows, batch_size=64)
                unrelated_after = evaluate(trained, tokenizer, unrelated_rows, batch_size=64)
                _save_run(place, facts, (before, after, unrelated_before, unrelated_after))
            runs.append(_read_run(place / "result.json"))
    result = DemoResult(settings, measured, runs)
    write_text(folder / DEMO_RESULTS_FILE, json.dumps(result.as_dict(), indent=1) + "\n")
    write_text(folder / TABLE_FILE, markdown_table(result.as_dict()))
    return result


def markdown_table(results: dict[str, Any]) -> str:
    """Write results as a Markdown table.

    Args:
        results: As `DemoResult.as_dict` returns them and ``results.json`` contains them.

    Returns:
        The table, one row per task and method, with the base model's scores in the task's first row.
    """
    lines = [
        "| task | method | trainable | of LoRA | adapter FLOPs per token | tokens/s | exact match | unrelated loss |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    seen: set[str] = set()
    for run in results["runs"]:
        if run["task"] not in seen:
            seen.add(run["task"])
            match, loss = run["before"]["exact_match"], run["unrelated_before"]["loss"]
            lines.append(f"| {run['task']} | (before) | | | | | {match:.3f} | {loss:.3f} |")
        cost = run["cost"]
        lines.append(
            f"| | `{run['method']}` | {cost['trainable_parameters']:,} | {cost['lora_count_ratio']:.1%} | "
            f"{cost['adapter_flops_per_token']:,.0f} | {run['training']['tokens_per_s']:,.0f} | "
            f"{run['after']['exact_match']:.3f} | {run['unrelated_after']['loss']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _open(folder: Path, settings: DemoSettings) -> Path:
    """Open an empty folder, or one with the same demonstration."""
    identity = {"settings": seal(asdict(settings)), "version": __version__}
    note = folder / SETTINGS_FILE
    if note.is_file() and read_json(note, lambda found: _damaged(note, found)).get("identity") == identity:
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(
            f"{folder} already has other files, or a demonstration with other settings.",
            fix="choose another folder with -o, or remove this one",
        )
    write_text(note, json.dumps({"identity": identity, "settings": asdict(settings)}, indent=1) + "\n")
    return folder


def _profile(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: DemoSettings) -> Profile:
    """Profile the base model on training rows of every task."""
    streams = {}
    for task, source in settings.tasks.items():
        rows = read_rows(source, num_rows=settings.profile_rows, seed=settings.seed)
        streams[task] = list(batches([encode(row, tokenizer) for row in rows], int(tokenizer.pad_token_id), 32))
    return profile(base, streams, provenance={"model": "embedded", "data": dict(settings.tasks)})


def _held_out(source: str, settings: DemoSettings) -> list[Row]:
    """Read test rows of a task."""
    return read_rows(source, num_rows=settings.eval_rows, split="test", seed=settings.seed)


def _train(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    measured: Profile,
    task: str,
    method: str,
    place: Path,
    settings: DemoSettings,
) -> tuple[PeftModel, dict[str, Any]]:
    """Plan from the task's own counts, and train a copy of the base."""
    options = {"hot": settings.hot} if method in ("hellora", "random", "cold") else {}
    made = plan(measured.of_task(task), method, rank=settings.rank, seed=settings.seed, **options)
    shutil.rmtree(place, ignore_errors=True)  # a killed run starts again; a run takes about a minute
    rows = read_rows(settings.tasks[task], num_rows=settings.steps * settings.batch_size, seed=settings.seed)
    training = TrainSettings(
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        seed=settings.seed,
        save_every=settings.steps,
    )
    result = train(copy.deepcopy(base), tokenizer, made, rows, place / "adapter", training, progress=False)
    if result.interrupted:
        end_by(result.signal)
    made.save(place / "plan.json")
    return result.model, {"task": task, "method": method, "cost": made.cost.as_dict(), "training": result.as_dict()}


def _read_run(file: Path) -> DemoRun:
    """Read one run's result."""
    fields = read_run(file, lambda found: _damaged(file, found))
    return DemoRun(**{name: fields[name] for name in DemoRun.__dataclass_fields__})


def _damaged(file: Path, found: str) -> ConfigurationError:
    """Make the error for a damaged file of the demonstration."""
    return ConfigurationError(f"{file} is damaged.", found=found, fix="remove it, and run the demonstration again")


def _save_run(
    place: Path, facts: dict[str, Any], scores: tuple[Evaluation, Evaluation, Evaluation, Evaluation]
) -> None:
    """Write one run's result atomically."""
    names = ("before", "after", "unrelated_before", "unrelated_after")
    record = facts | {name: score.as_dict() for name, score in zip(names, scores, strict=True)}
    write_text(place / "result.json", json.dumps(record, indent=1) + "\n")
