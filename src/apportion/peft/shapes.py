"""The modules that hold each kind of shape, and making them for a site or for a layer's experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from apportion.adapters.shapes.base import Place, Size
from apportion.adapters.shapes.base import Shape as ShapeModule
from apportion.adapters.shapes.blocks import Blocks as BlocksModule
from apportion.adapters.shapes.experts import ExpertShapes, ShapeStack, Stack
from apportion.adapters.shapes.low_rank import LowRank as LowRankModule
from apportion.adapters.shapes.low_rank import dense_factors, low_rank
from apportion.adapters.shapes.low_rank_stack import low_rank_stack, sparse_stack
from apportion.adapters.shapes.routed import Routed as RoutedModule
from apportion.adapters.shapes.sparse import SparseOptions, sparse_factors
from apportion.adapters.specs import ExpertFactors
from apportion.records.placement import Placement
from apportion.records.shapes.base import Shape
from apportion.records.shapes.blocks import Blocks
from apportion.records.shapes.low_rank import LowRank
from apportion.records.shapes.registry import register
from apportion.records.shapes.routed import Routed
from apportion.records.shapes.sparse import Sparse

MakeStack = Callable[[Mapping[str, ExpertFactors], Mapping[str, Place], SparseOptions], Stack]


@dataclass(frozen=True)
class ShapeKind:
    """How adapters of one kind of shape are made.

    Args:
        make: Makes the module of a record for a place.
        make_stack: Makes the module of many experts at once, whatever their ranks. By default, the experts of one
            projection and record share a module that `make` makes for as many copies.
    """

    make: Callable[[Any, Place, SparseOptions], ShapeModule]
    make_stack: MakeStack | None = None


def _routed(record: Routed, place: Place, options: SparseOptions) -> ShapeModule:
    """Make routed LoRA experts, dense or sparse."""
    expert, rank = record.expert, record.num_experts * record.rank
    factors = sparse_factors(place, rank, options) if isinstance(expert, Sparse) else dense_factors(place, rank)
    return RoutedModule(factors, place, record.num_experts, record.top_k, scale_of(record))


def scale_of(record: Shape) -> float:
    """Return the factor on an adapter's output: alpha / rank."""
    return record.alpha / record.rank


SHAPE_KINDS: dict[str, ShapeKind] = {
    LowRank.kind: ShapeKind(
        lambda record, place, _: low_rank(place, record.rank, scale_of(record)),
        lambda planned, places, _: low_rank_stack(planned, places),
    ),
    Sparse.kind: ShapeKind(
        lambda record, place, options: LowRankModule(*sparse_factors(place, record.rank, options), scale_of(record)),
        sparse_stack,
    ),
    Routed.kind: ShapeKind(_routed),
    Blocks.kind: ShapeKind(lambda record, place, _: BlocksModule(place, record.rank, scale_of(record), record.blocks)),
}


def register_shape(record: type[Any], make: Callable[[Any, Place], ShapeModule]) -> None:
    """Register a shape: plan files may contain its record, and hosts can have its module.

    Args:
        record: A frozen dataclass that follows `apportion.records.shapes.base.Shape`.
        make: Makes the module of a record for a place.

    Raises:
        ValueError: a shape of this kind is registered.
    """
    if record.kind in SHAPE_KINDS:
        raise ValueError(f"a shape {record.kind!r} is already registered.")
    register(record)
    SHAPE_KINDS[record.kind] = ShapeKind(lambda one, place, _: make(one, place))


def make_shape(record: Shape, place: Place, options: SparseOptions) -> ShapeModule:
    """Make the module of one adapter on one matrix.

    Args:
        record: The adapter's shape.
        place: The matrix.
        options: How sparse factors train and are stored.

    Returns:
        The module, not started.
    """
    return SHAPE_KINDS[record.kind].make(record, place, options)


def make_expert_shapes(
    placements: Iterable[Placement], places: Mapping[str, Place], options: SparseOptions
) -> ExpertShapes:
    """Make the module of one adapter on a layer's stacked experts.

    Args:
        placements: The adapters of the experts' projections.
        places: One expert's matrix of each projection.
        options: How sparse factors train and are stored.

    Returns:
        The module, not started.
    """
    groups: dict[str, dict[str, dict[int, Shape]]] = {}
    records: dict[Shape, str] = {}
    for placement in placements:
        _, expert, projection = placement.name
        if expert is None or projection is None:
            raise ValueError(f"{placement.site} is no projection of an expert.")
        shape = placement.shape
        kind = SHAPE_KINDS[shape.kind]
        name = shape.kind
        if kind.make_stack is None:
            name = f"{projection}_{records.setdefault(shape, str(len(records)))}"
        groups.setdefault(name, {}).setdefault(projection, {})[expert] = shape
    return ExpertShapes({name: _make_stack(group, places, options) for name, group in groups.items()})


def _make_stack(group: Mapping[str, Mapping[int, Shape]], places: Mapping[str, Place], options: SparseOptions) -> Stack:
    """Make the stack of the shapes of some experts' projections, all of one kind."""
    projection, by_expert = next(iter(group.items()))
    record = next(iter(by_expert.values()))
    kind = SHAPE_KINDS[record.kind]
    if kind.make_stack is not None:
        return kind.make_stack({name: _expert_factors(shapes) for name, shapes in group.items()}, places, options)
    experts = tuple(sorted(by_expert))
    place = places[projection]._replace(copies=(len(experts),))
    return ShapeStack(projection, experts, kind.make(record, place, options))


def _expert_factors(by_expert: Mapping[int, Shape]) -> ExpertFactors:
    """Describe the low-rank shapes of one projection's experts."""
    experts = tuple(sorted(by_expert))
    shapes = [by_expert[expert] for expert in experts]
    return ExpertFactors(experts, tuple(shape.rank for shape in shapes), tuple(scale_of(shape) for shape in shapes))


@lru_cache(maxsize=4096)
def tensor_sizes(
    record: Shape, out_features: int, in_features: int, options: SparseOptions
) -> Mapping[str, Size | None]:
    """Return the tensors that a checkpoint holds of an adapter on one matrix.

    Args:
        record: The adapter's shape.
        out_features: Output width of the matrix.
        in_features: Input width of the matrix.
        options: How sparse factors train and are stored.

    Returns:
        Sizes by name, behind the site's name; None where only some entries are kept.
    """
    place = Place(out_features, in_features, torch.device("meta"), torch.float32)
    return make_shape(record, place, options).sizes()
