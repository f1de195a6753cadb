"""Results of the demonstration as stored in ``results.json``, checked for what pages and tables show of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from apportion.records.json_file import JsonError, read_json, require_finite
from apportion.records.numbers import Amount, Count, describe_problem


class _Cost(BaseModel):
    """The shown part of a plan's cost."""

    trainable_parameters: Count
    lora_count_ratio: Amount
    adapter_flops_per_token: Amount


class _Score(BaseModel):
    """The shown part of an evaluation."""

    loss: Amount
    exact_match: Annotated[float, Field(ge=0, le=1)]


class _Training(BaseModel):
    """The shown part of a training run's figures."""

    tokens: Count
    seconds: Amount
    tokens_per_s: Amount


class _Run(BaseModel):
    """One method on one task."""

    task: str
    method: str
    cost: _Cost
    before: _Score
    after: _Score
    unrelated_before: _Score
    unrelated_after: _Score
    training: _Training


class _Results(BaseModel):
    """All runs of a demonstration."""

    settings: dict[str, Any]
    runs: list[_Run]


def read_results(path: Path, refusal: Callable[[str], Exception]) -> dict[str, Any]:
    """Read the results of a demonstration.

    Args:
        path: ``results.json``.
        refusal: Makes the error to raise from a description of the problem.

    Returns:
        The contents of the file.

    Raises:
        Exception: made by `refusal` if the file cannot be read, or has other fields than those of results.
    """
    return _checked(path, _Results, refusal)


def read_run(path: Path, refusal: Callable[[str], Exception]) -> dict[str, Any]:
    """Read the result of one run of a demonstration.

    Args:
        path: ``result.json``.
        refusal: Makes the error to raise from a description of the problem.

    Returns:
        The contents of the file.

    Raises:
        Exception: made by `refusal` if the file cannot be read, or has other fields than those of a run.
    """
    return _checked(path, _Run, refusal)


def _checked(path: Path, schema: type[BaseModel], refusal: Callable[[str], Exception]) -> dict[str, Any]:
    """Read a file, and check the fields that a schema lists."""
    data = read_json(path, refusal)
    try:
        require_finite(data)
        schema.model_validate(data)
    except ValidationError as error:
        raise refusal(describe_problem(error)) from error
    except JsonError as error:
        raise refusal(str(error)) from error
    return data
