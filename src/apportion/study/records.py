"""What a study leaves behind, as its JSON files hold it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from apportion.records.numbers import Amount, Count, Size, WholeNumber

SCHEMA_VERSION = 2

Unit = Literal["parameters", "flops"]
Metric = Literal["exact_match", "loss"]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PlanFile = Annotated[str, Field(pattern=r"^plans/[0-9a-f]{1,64}\.json$")]
Share = Annotated[float, Field(ge=0, le=1)]


class _Record(BaseModel):
    """Frozen, and strict about its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskDigests(_Record):
    """Hashes of a task's rows, in their order.

    Args:
        train: Of the rows that are trained on.
        validation: Of those that learning rates are chosen by.
        held_out: Of those that runs are scored on.
    """

    train: str
    validation: str
    held_out: str


class Contents(_Record):
    """Hashes of the rows and the models that a study computes with: part of ``study.json``.

    Args:
        tasks: By task, hashes of its rows.
        unrelated: Hash of the unrelated rows; None if the study has none.
        weights: By model, hash of a sample of its weights.
    """

    tasks: dict[str, TaskDigests]
    unrelated: str | None
    weights: dict[str, str]


class Score(_Record):
    """A model's result on held-out rows.

    Args:
        loss: Mean negative log-likelihood per completion token, in nats.
        exact_match: Share of rows answered exactly; None if rows have no answer.
        items: Whether each row was answered exactly, in the rows' order; empty where rows have no answer.
    """

    loss: float
    exact_match: Share | None
    items: tuple[bool, ...] = ()


class Run(_Record):
    """One training run of a study: ``runs/<key>.json``.

    Args:
        schema_version: Of this record.
        key: Hash of all that the result depends on; the file's name.
        model: The model, as the study names it.
        task: The task, as the study names it.
        contender: The contender's name in the study.
        method: Its planning method, or ``full`` for full fine-tuning.
        options: The method's options as planned.
        unit: What the budget counts.
        budget: The budget; for full fine-tuning, which has none, the model's parameters, whatever the unit.
        spent: What the plan takes of it.
        rank: The plan's rank; None for full fine-tuning.
        plan: The plan's file below the study's folder; None for full fine-tuning.
        plan_seal: Hash of the plan; None for full fine-tuning.
        seed: Seed of the factors' start and of the rows' order.
        lr: Peak learning rate.
        before: Score of the base model on the task.
        after: Score after training.
        unrelated_before: Score of the base model on unrelated rows.
        unrelated_after: Score on them after training; the difference is what was forgotten.
        steps: Optimizer steps.
        tokens: Tokens trained on.
        train_s: Seconds of training.
        peak_bytes: Peak of the process's memory (of the device's, on CUDA).
        trainable_parameters: Parameters trained.
        hot_set_drift: Mean over layers of the Jaccard index of the hottest experts before and after training; None for
            a dense model.
        versions: Versions of what computed it.
    """

    schema_version: int = SCHEMA_VERSION
    key: str
    model: str
    task: str
    contender: str
    method: str
    options: dict[str, Any]
    unit: Unit
    budget: Count
    spent: Count
    rank: Size | None
    plan: PlanFile | None
    plan_seal: str | None
    seed: WholeNumber
    lr: Rate
    before: Score
    after: Score
    unrelated_before: Score | None
    unrelated_after: Score | None
    steps: Count
    tokens: Count
    train_s: Amount
    peak_bytes: Count
    trainable_parameters: Count
    hot_set_drift: Share | None
    versions: dict[str, str]


class Interval(_Record):
    """An estimate with a bootstrap interval."""

    estimate: float
    low: float
    high: float


class Base(_Record):
    """What is measured once of a model that no run has touched: ``profiles/<key>.json``.

    Args:
        schema_version: Of this record.
        model: The model, as the study names it.
        weights: Hash of a sample of its weights.
        before: By task, its score on held-out rows.
        unrelated: Its score on unrelated rows.
        stability: By task, the mean over layers of the Jaccard index between the hottest experts of the calibration
            rows and those of a resample; the interval holds the resamples' middle share. Empty for a dense model.
    """

    schema_version: int = SCHEMA_VERSION
    model: str
    weights: str
    before: dict[str, Score]
    unrelated: Score | None
    stability: dict[str, Interval]


class Trial(_Record):
    """One learning rate tried on the tuning seed: ``tuning/<key>.json``.

    Args:
        schema_version: Of this record.
        key: Hash of all that the result depends on; the file's name.
        model: The model.
        task: The task.
        contender: The contender.
        budget: The budget.
        lr: The learning rate tried.
        loss: On validation rows, after training; None if training diverged.
        train_s: Seconds of training.
    """

    schema_version: int = SCHEMA_VERSION
    key: str
    model: str
    task: str
    contender: str
    budget: Count
    lr: Rate
    loss: float | None
    train_s: Amount


class CellSummary(_Record):
    """One contender at one budget on one task: mean over seeds, with an interval.

    Where there is one seed, an interval of a loss is the estimate alone.
    """

    model: str
    task: str
    contender: str
    budget: Count
    spent: Count
    seeds: Count
    exact_match: Interval | None
    loss: Interval
    forgetting: Interval | None


class Comparison(_Record):
    """A paired difference between a contender and the reference at one budget, the mean over the study's tasks.

    Args:
        model: The model.
        task: ``all``: the mean over tasks.
        budget: The budget; the reference's, where full fine-tuning is compared with it.
        contender: What is compared.
        reference: With what.
        metric: ``exact_match`` (higher is better) or ``loss`` (lower is better).
        runs: Pairs of runs: tasks times seeds.
        difference: Contender minus reference, with its interval.
        p: Of the permutation tests over runs and over items, the larger.
        p_corrected: After correction for all comparisons of the study.
        smallest_effect: The smallest difference that the design could have seen, at the study's level divided by its
            comparisons and 80 % power; None if so few runs can show none.
        differs: Whether the data tell the two apart.
    """

    model: str
    task: str
    budget: Count
    contender: str
    reference: str
    metric: Metric
    runs: Count
    difference: Interval
    p: float
    p_corrected: float
    smallest_effect: float | None
    differs: bool


class Summary(_Record):
    """What a study says: ``summary.json``, computed from its runs alone.

    Args:
        schema_version: Of this record.
        name: The study's name.
        digest: Hash of the study's settings.
        unit: What budgets count.
        level: The level of significance.
        reference: The contender that the others are compared with.
        planned_runs: Runs that the study has.
        finished_runs: Runs that are done.
        cells: A summary of every contender, budget and task.
        comparisons: The comparisons.
        verdicts: Sentences; the first is the study's.
        hot_set_stability: By task, the mean Jaccard index of hot sets over resamples of the calibration rows.
        commands: What to type to get all this again.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    digest: str
    unit: Unit
    level: float
    reference: str
    planned_runs: Count
    finished_runs: Count
    cells: tuple[CellSummary, ...]
    comparisons: tuple[Comparison, ...]
    verdicts: tuple[str, ...]
    hot_set_stability: dict[str, Interval]
    commands: tuple[str, ...]
