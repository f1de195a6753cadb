"""One run of a study: train and evaluate a copy of the model, and write the record."""

from __future__ import annotations

import copy
import platform
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy
import peft
import scipy
import torch
import transformers
import trl
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apportion._version import __version__
from apportion.data.batches import batches, encode
from apportion.data.sources import Row
from apportion.discovery import find_sites
from apportion.errors import TrainingError
from apportion.evaluation import completion_loss, exact_matches
from apportion.loading import load_model
from apportion.methods.hot import experts_kept, hottest
from apportion.profiling.routing import routing_counter
from apportion.profiling.run import profile, weights_sample
from apportion.profiling.totals import TaskTotals
from apportion.records.plan import Plan
from apportion.records.profile import Profile
from apportion.signals import end_by
from apportion.study.contents import StudyRows, base_key, key_of, profile_key
from apportion.study.files import (
    base_path,
    profile_path,
    read_base,
    read_plan,
    read_profile,
    write_record,
)
from apportion.study.records import Base, Contents, Interval, Run, Score, Trial
from apportion.study.settings import StudySettings
from apportion.training.full import train_all
from apportion.training.result import TrainResult
from apportion.training.settings import TrainSettings
from apportion.training.sft import train

ADAPTERS, WORK = "adapters", ".work"
_EVAL_BATCH = 64
_PROFILE_BATCH = 32

# Shapes: L Mixture-of-Experts layers, E experts of the widest layer, N rows.


@dataclass(frozen=True)
class Job:
    """What one run depends on, besides the study's settings.

    Args:
        model: The model.
        task: The task.
        contender: The contender's name.
        budget: The budget.
        spent: The plan's cost.
        plan: The plan's path relative to the study's folder; None for full fine-tuning.
        plan_seal: Hash of the plan.
        seed: The seed; the tuning seed for a trial.
        lr: The learning rate; 0 until it is chosen.
    """

    model: str
    task: str
    contender: str
    budget: int
    spent: int
    plan: str | None
    plan_seal: str | None
    seed: int
    lr: float = 0.0

    @property
    def name(self) -> str:
        """A readable name of the run."""
        return f"{self.model}/{self.task}/{self.contender}/{self.budget}/seed {self.seed}"


class Bench:
    """One model with the study's data. It is loaded once and used by all runs in this process.

    Args:
        folder: The study's folder.
        settings: The study's settings.
        name: The model.
        rows: The study's rows.
        trust_remote_code: Run code that comes with the model.
    """

    def __init__(
        self, folder: Path, settings: StudySettings, name: str, rows: StudyRows, *, trust_remote_code: bool = False
    ) -> None:
        self.folder, self.settings, self.name, self.rows = folder, settings, name, rows
        self.model: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase
        self.model, self.tokenizer = load_model(name, trust_remote_code=trust_remote_code)

    @cached_property
    def weights(self) -> str:
        """Hash of a sample of the model's weights."""
        return weights_sample(self.model, find_sites(self.model))

    @cached_property
    def contents(self) -> Contents:
        """Hashes of the rows and of this model."""
        return self.rows.contents({self.name: self.weights})

    @cached_property
    def profile(self) -> Profile:
        """The model's profile on all tasks, measured at first use and then read from its file."""
        path = profile_path(self.folder, profile_key(self.settings, self.contents, versions(self.settings), self.name))
        if not path.is_file():
            streams = {task: self._batches(rows, _PROFILE_BATCH) for task, rows in self._calibration().items()}
            facts = {"model": self.name, "data": self.settings.tasks}
            profile(self.model, streams, sensitivity=True, provenance=facts).save(path)
        return read_profile(path, self.name, self.settings)

    @cached_property
    def base(self) -> Base:
        """Measurements of the untrained model, made at first use and then read from their file."""
        path = base_path(self.folder, base_key(self.settings, self.contents, versions(self.settings), self.name))
        if not path.is_file():
            base = Base(
                model=self.name,
                weights=self.weights,
                before={task: self.score(self.model, rows) for task, rows in self.rows.held_out.items()},
                unrelated=self._score_unrelated(self.model),
                stability=self._stability() if self.profile.layout.is_moe else {},
            )
            write_record(path, base)
        return read_base(path, self.name, self.settings, self.contents)

    def score(self, model: nn.Module, rows: Sequence[Row], *, answers: bool = True) -> Score:
        """Score a model on rows, without exact match if rows have no answers or `answers` is False."""
        loss, _, _ = completion_loss(model, self.tokenizer, rows, _EVAL_BATCH, self.settings.training.max_length)
        if not answers or not all("answer" in row and "prompt" in row for row in rows):
            return Score(loss=loss, exact_match=None)
        items = exact_matches(model, self.tokenizer, rows, _EVAL_BATCH)
        return Score(loss=loss, exact_match=sum(items) / len(items), items=tuple(items))

    def _score_unrelated(self, model: nn.Module) -> Score | None:
        """Score a model on the unrelated rows, by loss."""
        return self.score(model, self.rows.unrelated, answers=False) if self.rows.unrelated else None

    def _plan(self, job: Job) -> Plan | None:
        """Read a job's plan; full fine-tuning has none."""
        return None if job.plan is None else read_plan(self.folder, job.plan, job.plan_seal)

    def key(self, job: Job, *, trial: bool) -> str:
        """Hash everything that a run's result depends on."""
        rows = self.contents.tasks[job.task]
        return key_of(
            {
                "weights": self.weights,
                "rows": [rows.train, rows.validation if trial else rows.held_out, self.contents.unrelated],
                "job": asdict(job),
                "training": self._train_settings(job, trial=trial).resolved(),
                "hot": self.settings.profile.hot,
                "versions": versions(self.settings),
            }
        )

    def run(self, job: Job, *, keep_adapter: bool = False) -> Run:
        """Do a run."""
        key = self.key(job, trial=False)
        contender = self.settings.contender(job.contender)
        plan = self._plan(job)
        with self._trained(job, key, trial=False) as (result, peak_bytes, work):
            trained = result.model
            run = Run(
                key=key,
                model=job.model,
                task=job.task,
                contender=job.contender,
                method=contender.method,
                options=plan.options if plan else {},
                unit=self.settings.unit,
                budget=job.budget,
                spent=job.spent,
                rank=plan.rank if plan else None,
                plan=job.plan,
                plan_seal=job.plan_seal,
                seed=job.seed,
                lr=job.lr,
                before=self.base.before[job.task],
                after=self.score(trained, self.rows.held_out[job.task]),
                unrelated_before=self.base.unrelated,
                unrelated_after=self._score_unrelated(trained),
                steps=result.steps,
                tokens=result.tokens,
                train_s=result.seconds,
                peak_bytes=peak_bytes,
                trainable_parameters=sum(p.numel() for p in trained.parameters() if p.requires_grad),
                hot_set_drift=self._drift(trained, job.task) if self.profile.layout.is_moe else None,
                versions=versions(self.settings),
            )
            if keep_adapter and plan:
                shutil.copytree(
                    work, self.folder / ADAPTERS / key, ignore=lambda *_: ["checkpoints", "dense"], dirs_exist_ok=True
                )
        return run

    def trial(self, job: Job) -> Trial:
        """Try a learning rate."""
        key = self.key(job, trial=True)
        loss, seconds = None, 0.0
        try:
            with self._trained(job, key, trial=True) as (result, _, _):
                validation_loss = self.score(result.model, self.rows.validation[job.task], answers=False).loss
                loss, seconds = (validation_loss if numpy.isfinite(validation_loss) else None), result.seconds
        except TrainingError:  # a rate that is too high is a result, not a failure
            pass
        facts = {name: getattr(job, name) for name in ("model", "task", "contender", "budget", "lr")}
        return Trial(key=key, loss=loss, train_s=seconds, **facts)

    @contextmanager
    def _trained(self, job: Job, key: str, *, trial: bool) -> Iterator[tuple[TrainResult, int, Path]]:
        """Train a copy of the model in a temporary folder."""
        work = self.folder / WORK / key
        shutil.rmtree(work, ignore_errors=True)
        model, settings = copy.deepcopy(self.model), self._train_settings(job, trial=trial)
        plan, rows = self._plan(job), self.rows.train[job.task]
        _start_peak()
        try:
            if plan is None:
                result = train_all(model, self.tokenizer, rows, work, settings)
            else:
                result = train(model, self.tokenizer, plan, rows, work, settings, progress=False)
            if result.interrupted:
                end_by(result.signal)
            yield result, _peak_bytes(), work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _train_settings(self, job: Job, *, trial: bool) -> TrainSettings:
        """Return the training settings of a run, which writes no checkpoint before its end."""
        training = self.settings.training
        settings = TrainSettings(
            steps=training.steps,
            batch_size=training.batch_size,
            max_length=training.max_length,
            warmup_frac=training.warmup_frac,
            lr=job.lr,
            seed=job.seed,
        )
        steps = (self.settings.tuning.steps if trial else None) or training.steps
        return replace(settings, steps=steps, save_every=steps + 1)

    def _calibration(self) -> dict[str, list[Row]]:
        """Return the rows for profiling: the first training rows."""
        return {task: rows[: self.settings.profile.rows] for task, rows in self.rows.train.items()}

    def _batches(self, rows: Sequence[Row], size: int) -> list[dict[str, Tensor]]:
        """Tokenize and batch rows."""
        encoded = [encode(row, self.tokenizer, self.settings.training.max_length) for row in rows]
        return list(batches(encoded, int(self.tokenizer.pad_token_id), size))

    def _counts(self, model: nn.Module, rows: Sequence[Row], size: int) -> list[Tensor]:
        """Count routing per batch: int64, shape (L, E) each."""
        counts = []
        for batch in self._batches(rows, size):
            totals = TaskTotals.zeros(self.profile.layout)
            with routing_counter(model, self.profile.layout, totals) as run_batch:
                run_batch(batch)
            counts.append(totals.counts)
        return counts

    def _drift(self, trained: nn.Module, task: str) -> float:
        """Compare the hottest experts of the calibration rows before and after training."""
        counts = self._counts(trained, self._calibration()[task], _PROFILE_BATCH)
        return self._overlap(self.profile.counts[task], torch.stack(counts).sum(0))

    def _stability(self) -> dict[str, Interval]:
        """Compare every task's hottest experts with those of resampled calibration rows."""
        generator = numpy.random.default_rng(0)
        intervals = {}
        for task, rows in self._calibration().items():
            counts_NLE = torch.stack(self._counts(self.model, rows, 1))
            overlaps = []
            for _ in range(self.settings.profile.resamples):
                drawn = torch.from_numpy(generator.integers(len(rows), size=len(rows)))
                overlaps.append(self._overlap(counts_NLE.sum(0), counts_NLE[drawn].sum(0)))
            level = self.settings.level
            low, high = numpy.quantile(overlaps, [level / 2, 1 - level / 2])
            intervals[task] = Interval(estimate=float(numpy.mean(overlaps)), low=float(low), high=float(high))
        return intervals

    def _overlap(self, one_LE: Tensor, other_LE: Tensor) -> float:
        """Return the mean over layers of the Jaccard index of two counts' hottest experts."""
        overlaps = []
        for block, one, other in zip(self.profile.layout.blocks, one_LE, other_LE, strict=True):
            rows = [row[: block.num_experts].double().numpy() for row in (one, other)]
            num_hot = experts_kept(rows[0], self.settings.profile.hot)
            first, second = (set(hottest(row, num_hot)) for row in rows)
            overlaps.append(len(first & second) / len(first | second))
        return sum(overlaps) / len(overlaps)


def versions(settings: StudySettings) -> dict[str, str]:
    """Return the versions and hardware that the last digits of results depend on."""
    return {
        "apportion": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "peft": peft.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
        "threads": str(settings.threads),
    }


def _start_peak() -> None:
    """Reset the peak memory, if the system supports it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5", encoding="ascii")


def _peak_bytes() -> int:
    """Return the peak memory: the device's on CUDA, else the process's (since the last reset on Linux)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
