"""Number types of record files, and messages for invalid values."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationError

from apportion.errors import shortened

_LARGEST = 2**63 - 1  # maximum of int64

WholeNumber = Annotated[int, Field(strict=True, ge=-_LARGEST, le=_LARGEST)]
Count = Annotated[int, Field(strict=True, ge=0, le=_LARGEST)]
Size = Annotated[int, Field(strict=True, ge=1, le=_LARGEST)]
Amount = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
AnyFloat = Annotated[float, Field(strict=True)]


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Return the first problem of a validation error.

    Args:
        error: The error of pydantic.

    Returns:
        The place, as ``field.0.field``, and the problem.
    """
    first = error.errors(include_url=False, include_input=False)[0]
    return shortened(".".join(map(str, first["loc"]))) or "the whole file", first["msg"]


def describe_problem(error: ValidationError) -> str:
    """Return the first problem of a validation error as one line.

    Args:
        error: The error of pydantic.

    Returns:
        Place and problem.
    """
    place, problem = first_problem(error)
    return f"{place}: {problem}"
