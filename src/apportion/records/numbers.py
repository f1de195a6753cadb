"""Numbers as files may hold them, and what to say where one is something else."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationError

from apportion.errors import shortened

_LARGEST = 2**63 - 1  # of int64

WholeNumber = Annotated[int, Field(strict=True, ge=-_LARGEST, le=_LARGEST)]
Count = Annotated[int, Field(strict=True, ge=0, le=_LARGEST)]
Size = Annotated[int, Field(strict=True, ge=1, le=_LARGEST)]
Amount = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
AnyFloat = Annotated[float, Field(strict=True)]


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Say what is wrong first.

    Args:
        error: What pydantic found.

    Returns:
        The place, as ``field.0.field``, and what is wrong there.
    """
    first = error.errors(include_url=False, include_input=False)[0]
    return shortened(".".join(map(str, first["loc"]))) or "the whole file", first["msg"]


def describe_problem(error: ValidationError) -> str:
    """Say what is wrong first, with its place, in one line.

    Args:
        error: What pydantic found.

    Returns:
        Place and problem.
    """
    place, problem = first_problem(error)
    return f"{place}: {problem}"
