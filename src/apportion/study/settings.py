"""Settings of a study: ``STUDY.toml``, validated before anything runs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from apportion.data.sources import FILE_FORMATS
from apportion.data.tasks import task_names
from apportion.errors import ConfigurationError, DataError, shortened
from apportion.methods.registry import METHODS
from apportion.records.files import seal
from apportion.records.names import suggestion
from apportion.records.option_texts import parse_hot
from apportion.records.toml_file import read_toml
from apportion.study.records import Metric, Unit

FULL = "full"
_OWN_KEYS = ("name", "method", "rank", "below_budget", "lr_low", "lr_high")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**63)]

_RANK = re.compile(r"[1-9][0-9]{0,8}")


class _Settings(BaseModel):
    """A frozen model without extra keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Contender(_Settings):
    """A method with its options, or ``full`` for full fine-tuning.

    Args:
        name: Its name in the study; by default the method's.
        method: A planning method, or ``full``, which trains every weight and has no budget.
        options: The method's options. In TOML they are keys next to `name` and `method`.
        rank: Rank for methods with a `budget` option; for all others it follows from the budget.
        below_budget: Accept a plan that leaves more than `tolerance` of the budget unused.
        lr_low: Lowest learning rate, if it differs from the study's.
        lr_high: Highest learning rate, if it differs from the study's.
    """

    name: str
    method: str
    options: dict[str, Any] = {}
    rank: Count | None = None
    below_budget: bool = False
    lr_low: Positive | None = None
    lr_high: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, value: Any) -> Any:
        if isinstance(value, Contender):
            return value
        value = {"method": value} if isinstance(value, str) else value
        if not isinstance(value, dict) or not isinstance(value.get("options", {}), dict):
            raise ConfigurationError(
                f"a contender is {shortened(repr(value))}.",
                fix="give a method's name, or a table with method and options",
            )
        value = value | value.get("options", {})
        value.pop("options", None)
        if "method" not in value:
            raise ConfigurationError(
                f"contender {shortened(repr(value.get('name', value)))} has no method.", fix="give it one"
            )
        method = value["method"]
        if not isinstance(method, str) or (method != FULL and method not in METHODS):
            raise ConfigurationError(
                f"there is no method {shortened(repr(method))}.",
                fix=suggestion(str(method), [*METHODS, FULL], "choose among"),
            )
        options = () if method == FULL else METHODS[method].options.model_fields
        for key in value:
            if key not in (*_OWN_KEYS, *options):
                raise ConfigurationError(
                    f"contender {shortened(repr(value.get('name', method)))} has an unknown key "
                    f"{shortened(repr(key))}.",
                    fix=suggestion(key, [*_OWN_KEYS, *options], "choose among"),
                )
        fields = {key: value[key] for key in _OWN_KEYS if key in value}
        return {"name": method} | fields | {"options": {key: value[key] for key in value if key not in _OWN_KEYS}}

    @property
    def told_budget(self) -> bool:
        """Whether the method has a `budget` option."""
        return self.method != FULL and "budget" in METHODS[self.method].options.model_fields


class Training(_Settings):
    """Training settings of every run. Rows are drawn once per task, and shuffled with the run's seed."""

    steps: Count = 40
    batch_size: Count = 32
    max_length: Count = 1024
    warmup_frac: Annotated[float, Field(ge=0, lt=1)] = 0.03


class Tuning(_Settings):
    """How learning rates are chosen.

    Args:
        trials: Number of learning rates per contender, at even distances on a logarithmic scale.
        seed: Seed of these runs, which must differ from the study's seeds.
        low: Lowest learning rate.
        high: Highest learning rate.
        steps: Optimizer steps per trial; by default the study's.
        rows: Number of rows for the loss of a trial. They are neither training rows nor held-out rows of the study.
        each: ``contender`` tunes a contender once, on the first task and budget; ``task`` on every task at the first
            budget; ``budget`` on every task and budget.
    """

    trials: Count = 5
    seed: int = 1000
    low: Positive = 1e-3
    high: Positive = 2e-2
    steps: Count | None = None
    rows: Count = 128
    each: Annotated[str, Field(pattern="^(contender|task|budget)$")] = "task"


class Profiling(_Settings):
    """How the model is profiled: number of training rows per task, number of resamples, number of hot experts."""

    rows: Count = 256
    resamples: Count = 200
    hot: Annotated[int | str, Field(validate_default=True)] = "25%"

    @field_validator("hot")
    @classmethod
    def _read_hot(cls, value: int | str) -> int | str:
        return parse_hot(value)


class StudySettings(_Settings):
    """Everything that a study's results depend on.

    Args:
        name: The study's name.
        models: Models: hub ids, folders or names, as for every command.
        tasks: Data by task: training rows, and held-out rows of the test split (unless ``eval`` has the task).
        eval: Held-out data of tasks whose data have no test split.
        unrelated: Data whose loss measures forgetting; optional.
        contenders: The contenders.
        reference: The contender that all others are compared with; by default the first.
        unit: What a budget counts: trainable ``parameters``, or the adapters' ``flops`` per token.
        budgets: Numbers, or ``METHOD:RANK`` for the cost of that method.
        tolerance: Fraction of a budget that a plan may leave unused.
        seeds: Number of runs per contender, task and budget.
        eval_rows: Held-out rows per evaluation.
        metric: The compared metric.
        level: The level of significance.
        resamples: Number of resamples of the bootstrap and the permutation tests.
        threads: Threads per run; the last digits of results depend on it.
        training: Settings of training.
        tuning: Settings of choosing learning rates.
        profile: Settings of profiling.
    """

    name: str
    models: Annotated[tuple[str, ...], Field(min_length=1)] = ("embedded",)
    tasks: Annotated[dict[str, str], Field(min_length=1)]
    eval: dict[str, str] = {}
    unrelated: str | None = None
    contenders: Annotated[tuple[Contender, ...], Field(min_length=2)]
    reference: str = ""
    unit: Unit = "parameters"
    budgets: Annotated[tuple[int | str, ...], Field(min_length=1)]
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.05
    seeds: Count = 5
    eval_rows: Count = 200
    metric: Metric = "exact_match"
    level: Annotated[float, Field(gt=0, lt=1)] = 0.05
    resamples: Annotated[int, Field(ge=100)] = 9999
    threads: Count = 1
    training: Training = Training()
    tuning: Tuning = Tuning()
    profile: Profiling = Profiling()

    @field_validator("budgets")
    @classmethod
    def _know_budgets(cls, value: tuple[int | str, ...]) -> tuple[int | str, ...]:
        for budget in value:
            method, _, rank = str(budget).partition(":")
            if isinstance(budget, str):
                if method not in METHODS or not _RANK.fullmatch(rank):
                    raise ConfigurationError(
                        f"the budget {shortened(repr(budget))} is not understood.",
                        fix="give a number, or METHOD:RANK such as lora:2",
                    )
            elif budget < 1:
                raise ConfigurationError(f"the budget {budget} is too small.", fix="give a number above 0")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> StudySettings:
        names = [contender.name for contender in self.contenders]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ConfigurationError(f"two contenders have the name {twice!r}.", fix="give them different names")
        if not self.reference:
            object.__setattr__(self, "reference", names[0])
        if self.reference not in names:
            raise ConfigurationError(
                f"the reference {shortened(repr(self.reference))} is not a contender.",
                fix=suggestion(self.reference, names, "choose"),
            )
        if self.contender(self.reference).method == FULL:
            raise ConfigurationError(
                "full fine-tuning cannot be the reference, because it has no budget.",
                fix="choose another reference",
            )
        if self.tuning.seed in range(self.seeds):
            raise ConfigurationError(
                f"the tuning seed {self.tuning.seed} is one of the study's.", fix=f"give at least {self.seeds}"
            )
        for task in self.eval:
            if task not in self.tasks:
                raise ConfigurationError(
                    f"eval names a task {task!r} that the study does not have.",
                    fix=suggestion(task, self.tasks, "choose among"),
                )
        for contender in self.contenders:
            low, high = self.learning_rates(contender)
            if contender.rank is not None and not contender.told_budget:
                raise ConfigurationError(
                    f"contender {contender.name!r} has a rank, but its rank follows from the budget.",
                    fix="leave it out",
                )
            if "budget" in contender.options:
                raise ConfigurationError(
                    f"contender {contender.name!r} has its own budget.", fix="leave it out, and set budgets"
                )
            if low > high:
                raise ConfigurationError(
                    f"contender {contender.name!r} has no learning rate from {low:g} to {high:g}.",
                    fix="give the lower one first",
                )
        return self

    def contender(self, name: str) -> Contender:
        """Return the contender with a name."""
        return next(contender for contender in self.contenders if contender.name == name)

    def learning_rates(self, contender: Contender) -> tuple[float, float]:
        """Return the lowest and the highest learning rate to try for a contender."""
        return contender.lr_low or self.tuning.low, contender.lr_high or self.tuning.high

    @property
    def planned_runs(self) -> int:
        """Runs of the whole study; full fine-tuning has no budget, so it runs once where others run at each budget."""
        cells = sum(1 if one.method == FULL else len(self.budgets) for one in self.contenders)
        return len(self.models) * len(self.tasks) * self.seeds * cells

    @property
    def digest(self) -> str:
        """Hash of all settings."""
        return seal(self.model_dump(mode="json"))


def load_settings(path: str | os.PathLike[str], overrides: dict[str, Any] | None = None) -> StudySettings:
    """Read a study file.

    Args:
        path: A TOML file.
        overrides: Settings that replace the file's, by key; a key of a table as ``table.key``.

    Returns:
        The settings.

    Raises:
        ConfigurationError: the file is missing or not TOML, or a key, a method or a value in it is wrong.
        DataError: a task is unknown.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigurationError(f"there is no study file {file}.", fix="give a .toml file, or options")

    def refusal(found: str) -> ConfigurationError:
        return ConfigurationError(f"the study file {file} is not TOML.", found=found)

    data = read_toml(file, refusal)
    return check_settings({"name": file.stem} | data, overrides, place=str(file))


def check_settings(data: dict[str, Any], overrides: dict[str, Any] | None = None, place: str = "") -> StudySettings:
    """Validate the settings of a study.

    Args:
        data: The contents of the TOML file.
        overrides: Settings that replace it, by key; a key of a table as ``table.key``.
        place: The source, for messages.

    Returns:
        The settings.

    Raises:
        ConfigurationError: a key, a method or a value is wrong.
        DataError: a task is unknown.
    """
    for key, value in (overrides or {}).items():
        table, _, inner = key.rpartition(".")
        (data.setdefault(table, {}) if table else data)[inner] = value
    try:
        settings = StudySettings(**data)
    except ValidationError as error:
        raise _explained(error, place) from error
    except ConfigurationError as error:
        raise error.at(place) from error
    for source in (*settings.tasks.values(), *settings.eval.values(), settings.unrelated or ""):
        if source.startswith("task:"):
            name = source.removeprefix("task:").partition("?")[0].partition(":")[0]
            known = task_names()
            if name not in known:
                raise DataError(f"there is no task {name!r}.", fix=suggestion(name, known, "see reasoning-gym:"))
    for task, source in settings.tasks.items():
        is_one_split = source.partition("?")[0].count(":") > 1 or Path(source).suffix in FILE_FORMATS
        if is_one_split and task not in settings.eval:
            raise DataError(
                f"the data of task {task!r} have no test split besides the training rows.",
                found=source,
                fix=f"give held-out data: [eval] {task} = ...",
            )
    return settings


def _explained(error: ValidationError, place: str) -> ConfigurationError:
    """Make the error for the first invalid key of a study."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigurationError):
        return inner.at(place)
    if first["type"] == "extra_forbidden":
        models: dict[str, type[BaseModel]] = {"training": Training, "tuning": Tuning, "profile": Profiling}
        known = models.get(str(first["loc"][0]), StudySettings).model_fields
        near = suggestion(str(first["loc"][-1]), known, "choose among")
        return ConfigurationError(f"there is no key {where!r}.", place=place, fix=near)
    if first["type"] == "missing":
        return ConfigurationError(f"the key {where!r} is missing.", place=place, fix="give it")
    value = shortened(repr(first["input"]))
    return ConfigurationError(f"{where} = {value} is wrong: {first['msg']}.", place=place)
