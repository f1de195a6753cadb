"""`Site`: a weight matrix that can get an adapter; `Layout`: all sites of one model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from apportion.records.numbers import Count, Size, describe_problem

Kind = Literal["attention", "router", "experts", "shared", "dense"]
Storage = Literal["linear", "fused", "weight"]

MAX_SITES = 1_000_000  # per model; the largest published models have about 100,000
_STRICT = ConfigDict(extra="forbid")
KINDS: tuple[Kind, ...] = ("attention", "router", "experts", "shared", "dense")


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class Site:
    """One weight matrix that can get an adapter.

    Args:
        name: The module's path, or ``<experts module>.<expert>.<projection>`` for an expert's projection.
        kind: The part of the model: attention, router, routed experts, shared experts or dense MLP.
        layer: The decoder layer, from 0.
        projection: Short name of its role: ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``, ``router``, ...
        in_features: Input width.
        out_features: Output width.
        expert: The expert's id, if the kind is ``experts``.
        storage: ``linear`` for a linear layer, ``fused`` for a slice of a stacked experts parameter, ``weight`` for a
            module of another class that holds a two-dimensional ``weight`` (most routers).
    """

    name: str
    kind: Kind
    layer: Count
    projection: str
    in_features: Size
    out_features: Size
    expert: Count | None = None
    storage: Storage = "linear"

    def num_parameters(self, rank: int) -> int:
        """Count the parameters of LoRA with this rank."""
        return rank * (self.in_features + self.out_features)


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class Projection:
    """A projection of every expert of a block: short name, last part of the site names, and shape."""

    name: str
    suffix: str
    in_features: Size
    out_features: Size


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class ExpertBlock:
    """The routed experts of one layer.

    Args:
        name: The experts module's path.
        layer: The decoder layer, from 0.
        num_experts: Number of experts in the block.
        top_k: Experts per token.
        projections: Projections of each expert.
        storage: ``fused`` for stacked parameters, ``linear`` for one module per expert.
    """

    name: str
    layer: Count
    num_experts: Size
    top_k: Size
    projections: tuple[Projection, ...]
    storage: Storage = "fused"

    def site(self, expert: int, projection: Projection) -> Site:
        """Return the site of one projection of one expert."""
        return Site(
            name=f"{self.name}.{expert}.{projection.suffix}",
            kind="experts",
            layer=self.layer,
            projection=projection.name,
            in_features=projection.in_features,
            out_features=projection.out_features,
            expert=expert,
            storage=self.storage,
        )


@with_config(_STRICT)
@dataclass(frozen=True)
class Layout:
    """All sites of one model, and data to identify the model.

    Args:
        model_class: The model's class, for messages.
        model_type: The configuration's ``model_type``.
        base_parameters: Number of parameters of the model.
        fingerprint: SHA-256 over model type, parameter names and shapes. Equal architectures have equal fingerprints.
        others: All sites outside the routed experts, in model order.
        blocks: The routed experts, one block per Mixture-of-Experts layer, in model order.
    """

    model_class: str
    model_type: str
    base_parameters: Size
    fingerprint: str
    others: tuple[Site, ...] = ()
    blocks: tuple[ExpertBlock, ...] = field(default=())

    @property
    def is_moe(self) -> bool:
        """Whether the model has routed experts."""
        return bool(self.blocks)

    def sites(self) -> Iterator[Site]:
        """Iterate over all sites: first the others, then the experts, by block and expert."""
        yield from self.others
        for block in self.blocks:
            for expert in range(block.num_experts):
                for projection in block.projections:
                    yield block.site(expert, projection)

    @cached_property
    def by_name(self) -> dict[str, Site]:
        """Sites by name."""
        return {site.name: site for site in self.sites()}

    def describe(self) -> str:
        """Return a one-line description of the model."""
        if not self.blocks:
            return f"{self.model_class}, no routed experts, {len(self.others)} matrices"
        widths = sorted({block.num_experts for block in self.blocks})
        experts = " or ".join(map(str, widths))
        return f"{self.model_class}, {len(self.blocks)} MoE layers x {experts} experts"

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Layout:
        """Rebuild a layout from `as_dict`.

        Args:
            data: Plain data.

        Returns:
            The layout.

        Raises:
            ValueError: a field is missing, unknown or of the wrong type, a number is out of range, or two sites have
                the same name.
        """
        try:
            layout = _validator().validate_python(data)
        except ValidationError as error:
            raise ValueError(f"layout.{describe_problem(error)}") from error
        if any(site.kind == "experts" or site.expert is not None for site in layout.others):
            raise ValueError("layout.others contains an expert's site")
        per_block = (block.num_experts * max(1, len(block.projections)) for block in layout.blocks)
        count = len(layout.others) + sum(per_block)
        if count > MAX_SITES:
            raise ValueError(f"the layout has {count:,} sites, more than any model")
        if len(layout.by_name) < sum(1 for _ in layout.sites()):
            raise ValueError("two sites have the same name")
        return layout


@cache
def _validator() -> TypeAdapter[Layout]:
    """Return the cached validator of a layout."""
    return TypeAdapter(Layout)


def fingerprint(model_type: str, shapes: dict[str, tuple[int, ...]]) -> str:
    """Hash an architecture: its type, and the names and shapes of its parameters."""
    canonical = json.dumps([model_type, sorted((name, list(shape)) for name, shape in shapes.items())])
    return hashlib.sha256(canonical.encode()).hexdigest()
