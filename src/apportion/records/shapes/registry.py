"""Shapes by kind: reading and writing them, and making those of LoRA and its variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from apportion.errors import PlanError, shortened
from apportion.records.numbers import first_problem
from apportion.records.shapes.base import Shape
from apportion.records.shapes.blocks import Blocks
from apportion.records.shapes.low_rank import LowRank
from apportion.records.shapes.routed import Routed
from apportion.records.shapes.sparse import Sparse

_KINDS: dict[str, type[Any]] = {}


def register(shape: type[Any]) -> type[Any]:
    """Register a shape, so that plan files can contain it.

    Args:
        shape: A frozen dataclass with a ``kind`` that follows `Shape`.

    Returns:
        The same class, for use as a decorator.

    Raises:
        ValueError: another shape with the same kind is registered.
    """
    if _KINDS.setdefault(shape.kind, shape) is not shape:
        raise ValueError(f"a shape {shape.kind!r} is already registered.")
    return shape


for _shape in (LowRank, Sparse, Routed, Blocks):
    register(_shape)


def shape_as_dict(shape: Shape) -> dict[str, Any]:
    """Convert a shape to plain data.

    Args:
        shape: A registered shape.

    Returns:
        Its kind and its fields; nested shapes are converted too.
    """
    values = {field.name: getattr(shape, field.name) for field in fields(shape)}  # type: ignore[arg-type]
    return {"kind": shape.kind} | {k: shape_as_dict(v) if hasattr(v, "kind") else v for k, v in values.items()}


def shape_from_dict(data: Mapping[str, Any]) -> Shape:
    """Rebuild a shape from `shape_as_dict`.

    Args:
        data: Plain data.

    Returns:
        The shape.

    Raises:
        PlanError: the kind is unknown, or a field is missing, unknown, of the wrong type or out of range.
    """
    rest = {name: shape_from_dict(v) if isinstance(v, Mapping) else v for name, v in data.items() if name != "kind"}
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise PlanError(f"unknown shape {shortened(repr(kind))}.", expected=", ".join(_KINDS))
    try:
        shape: Shape = TypeAdapter(_KINDS[kind]).validate_python(rest)
    except ValidationError as error:
        reason = error.errors()[0].get("ctx", {}).get("error")
        if isinstance(reason, PlanError):
            raise reason from error
        place, problem = first_problem(error)
        raise PlanError(f"{place} of shape {kind!r}: {problem}") from error
    return shape


@lru_cache(maxsize=1024)
def lora_shape(rank: int, alpha: float, *, num_experts: int = 1, top_k: int = 1, sparsity: float = 0.0) -> Shape:
    """Return the shape of plain, sparse or routed LoRA.

    Args:
        rank: Rank of each LoRA expert.
        alpha: Scale numerator.
        num_experts: Number of LoRA experts; 1 for plain LoRA.
        top_k: LoRA experts used per token.
        sparsity: Share of the entries of B that are zero; 0 for a dense B.

    Returns:
        The shape.

    Raises:
        PlanError: a value is out of range.
    """
    expert = Sparse(rank, alpha, sparsity) if sparsity else LowRank(rank, alpha)
    return expert if num_experts == 1 and top_k == 1 else Routed(expert, num_experts, top_k)
