"""Where adapters can stand: one `Site` a weight matrix, and the `Layout` of all sites of one model."""

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

MAX_SITES = 1_000_000  # of a model: the largest published ones have about 100,000
_STRICT = ConfigDict(extra="forbid")
KINDS: tuple[Kind, ...] = ("attention", "router", "experts", "shared", "dense")


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class Site:
    """One weight matrix that an adapter can stand on.

    Args:
        name: The module's path, or ``<experts module>.<expert>.<projection>`` for an expert's projection.
        kind: What the matrix belongs to.
        layer: The decoder layer, from 0.
        projection: The role in short: ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``, ``router``, ...
        in_features: Width of the input.
        out_features: Width of the output.
        expert: The expert's id where the kind is ``experts``.
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
        """Count the parameters of the two factors of a LoRA of this rank."""
        return rank * (self.in_features + self.out_features)


@with_config(_STRICT)
@dataclass(frozen=True, slots=True)
class Projection:
    """One projection that every expert of a block has: its short name, the last part of its site names, its shape."""

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
        num_experts: Experts in the block.
        top_k: Experts that a token is routed to.
        projections: What every expert consists of.
        storage: ``fused`` for stacked parameters, ``linear`` for one module an expert.
    """

    name: str
    layer: Count
    num_experts: Size
    top_k: Size
    projections: tuple[Projection, ...]
    storage: Storage = "fused"

    def site(self, expert: int, projection: Projection) -> Site:
        """Give the site of one projection of one expert."""
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
    """All sites of one model, and enough about the model to tell it from others.

    Args:
        model_class: The model's class, for messages.
        model_type: The configuration's ``model_type``.
        base_parameters: Number of the model's own parameters.
        fingerprint: SHA-256 over class, names and shapes of all parameters: equal for equal architectures.
        others: Every site that is not a routed expert, in model order.
        blocks: The routed experts, one block a Mixture-of-Experts layer, in model order.
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
        """Go through every site: first the others, then the experts, block by block and expert by expert."""
        yield from self.others
        for block in self.blocks:
            for expert in range(block.num_experts):
                for projection in block.projections:
                    yield block.site(expert, projection)

    @cached_property
    def by_name(self) -> dict[str, Site]:
        """Map the sites' names to the sites."""
        return {site.name: site for site in self.sites()}

    def describe(self) -> str:
        """Say in one line what model this is."""
        if not self.blocks:
            return f"{self.model_class}, no routed experts, {len(self.others)} matrices"
        widths = sorted({block.num_experts for block in self.blocks})
        experts = " or ".join(map(str, widths))
        return f"{self.model_class}, {len(self.blocks)} MoE layers x {experts} experts"

    def as_dict(self) -> dict[str, Any]:
        """Give plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Layout:
        """Rebuild a layout from `as_dict`.

        Args:
            data: Plain data.

        Returns:
            The layout.

        Raises:
            ValueError: a field is missing, unknown or of another type, a number is none that a model can have, or two
                sites have one name.
        """
        try:
            layout = _validator().validate_python(data)
        except ValidationError as error:
            raise ValueError(f"layout.{describe_problem(error)}") from error
        if any(site.kind == "experts" or site.expert is not None for site in layout.others):
            raise ValueError("an expert's site outside the experts")
        per_block = (block.num_experts * max(1, len(block.projections)) for block in layout.blocks)
        count = len(layout.others) + sum(per_block)
        if count > MAX_SITES:
            raise ValueError(f"{count:,} sites, which no model has")
        if len(layout.by_name) < sum(1 for _ in layout.sites()):
            raise ValueError("two sites of one name")
        return layout


@cache
def _validator() -> TypeAdapter[Layout]:
    """Prepare the check of a layout's fields."""
    return TypeAdapter(Layout)


def fingerprint(model_type: str, shapes: dict[str, tuple[int, ...]]) -> str:
    """Hash an architecture: its type, and the names and shapes of its parameters."""
    canonical = json.dumps([model_type, sorted((name, list(shape)) for name, shape in shapes.items())])
    return hashlib.sha256(canonical.encode()).hexdigest()
