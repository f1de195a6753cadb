"""Records of a study, as stored in its JSON files."""

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
    """A frozen model without extra fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskDigests(_Record):
    """Hashes of a task's rows, in their order.

    Args:
        train: Hash of the training rows.
        validation: Hash of the rows for choosing learning rates.
        held_out: Hash of the rows for evaluating runs.
    """

    train: str
    validation: str
    held_out: str


class Contents(_Record):
    """Hashes of a study's rows and models: part of ``study.json``.

    Args:
        tasks: Hashes of the rows, by task.
        unrelated: Hash of the unrelated rows; None if the study has none.
        weights: Hash of a sample of the weights, by model.
    """

    tasks: dict[str, TaskDigests]
    unrelated: str | None
    weights: dict[str, str]


class Score(_Record):
    """A model's result on held-out rows.

    Args:
        loss: Mean negative log-likelihood per completion token, in nats.
        exact_match: Fraction of rows answered exactly; None if rows have no answer.
        items: Whether each row was answered exactly, in row order; empty if rows have no answer.
    """

    loss: float
    exact_match: Share | None
    items: tuple[bool, ...] = ()


class Run(_Record):
    """One training run of a study: ``runs/<key>.json``.

    Args:
        schema_version: Version of this record's format.
        key: Hash of everything that the result depends on; the file's name.
        model: The model's name in the study.
        task: The task's name in the study.
        contender: The contender's name in the study.
        method: Its planning method, or ``full`` for full fine-tuning.
        options: The method's options in the plan.
        unit: Unit of the budget.
        budget: The budget; for full fine-tuning, which has none, the model's number of parameters.
        spent: The plan's cost in this unit.
        rank: The plan's rank; None for full fine-tuning.
        plan: The plan's path relative to the study's folder; None for full fine-tuning.
        plan_seal: Hash of the plan; None for full fine-tuning.
        seed: Seed of the factors' initial values and of the row order.
        lr: Peak learning rate.
        before: Score of the base model on the task.
        after: Score after training.
        unrelated_before: Score of the base model on unrelated rows.
        unrelated_after: Score on them after training; the difference measures forgetting.
        steps: Number of optimizer steps.
        tokens: Number of tokens trained on.
        train_s: Seconds of training.
        peak_bytes: Peak memory of the process (of the device, on CUDA).
        trainable_parameters: Number of trained parameters.
        hot_set_drift: Mean over layers of the Jaccard index of the hottest experts before and after training; None for
            a dense model.
        versions: Versions of the software that computed it.
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
    """Measurements of an untrained model: ``profiles/<key>.json``.

    Args:
        schema_version: Version of this record's format.
        model: The model's name in the study.
        weights: Hash of a sample of its weights.
        before: Its score on held-out rows, by task.
        unrelated: Its score on unrelated rows.
        stability: By task, the mean over layers of the Jaccard index between the hottest experts of the calibration
            rows and those of a resample, with the central interval over resamples. Empty for a dense model.
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
        schema_version: Version of this record's format.
        key: Hash of everything that the result depends on; the file's name.
        model: The model.
        task: The task.
        contender: The contender.
        budget: The budget.
        lr: The learning rate.
        loss: Loss on validation rows after training; None if training diverged.
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
    """One contender at one budget on one task: means over seeds with intervals.

    With one seed, the interval of a loss has no width.
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
        budget: The budget; for full fine-tuning, the reference's budget.
        contender: The contender.
        reference: The reference.
        metric: ``exact_match`` (higher is better) or ``loss`` (lower is better).
        runs: Number of pairs of runs: tasks times seeds.
        difference: Contender minus reference, with its interval.
        p: The larger p of the permutation tests over runs and over items.
        p_corrected: The p value corrected for all comparisons of the study.
        smallest_effect: The smallest difference that the design could detect, at the study's level divided by the
            number of comparisons and with 80 % power; None if there are too few runs to detect any.
        differs: Whether the corrected p is at most the level.
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
    """Results of a study: ``summary.json``, computed from its runs.

    Args:
        schema_version: Version of this record's format.
        name: The study's name.
        digest: Hash of the study's settings.
        unit: Unit of the budgets.
        level: The level of significance.
        reference: The contender that the others are compared with.
        planned_runs: Number of the study's runs.
        finished_runs: Number of finished runs.
        cells: One summary per contender, budget and task.
        comparisons: The comparisons.
        verdicts: Sentences; the first one is about the study.
        hot_set_stability: By task, the mean Jaccard index of hot sets over resamples of the calibration rows.
        commands: Commands that reproduce the study.
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
