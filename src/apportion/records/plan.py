"""`Plan`: which sites get which adapter, and its file."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, StrictInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass

from apportion.errors import PlanError, shortened
from apportion.records.braces import expand_braces, fold_braces, num_expanded
from apportion.records.cost import Cost
from apportion.records.files import seal, write_text
from apportion.records.json_file import JsonError, check_depth, read_json
from apportion.records.numbers import AnyFloat, WholeNumber, first_problem
from apportion.records.site import MAX_SITES, Site

SCHEMA_VERSION = 1
MAX_WIDTH = 65_536  # rows of an A, over all LoRA experts of a site: no published model has a matrix as wide
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**127  # in float32, in which adapters are computed

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Placement:
    """One adapter at one site.

    Args:
        site: The site's name.
        rank: Rank of the factors, of every LoRA expert where there are several.
        alpha: Scale numerator: the adapter's output is multiplied by alpha / rank.
        num_experts: LoRA experts at the site; one is plain LoRA.
        top_k: LoRA experts that a token uses.
        sparsity: Share of the entries of B that stay zero.
    """

    site: str
    rank: int
    alpha: float
    num_experts: int = 1
    top_k: int = 1
    sparsity: float = 0.0

    def __post_init__(self) -> None:
        """Refuse numbers that no adapter can have."""
        _check_size(self.site, self.rank, self.alpha)
        if not 0 <= self.sparsity < 1:
            raise PlanError(
                f"{self.site} has sparsity {self.sparsity}.\n  fix:  give a share of at least 0 and below 1"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise PlanError(
                f"{self.site} has {self.num_experts} LoRA experts and cannot use {self.top_k} of them for a token.\n"
                "  fix:  give a top_k of at least 1 and at most the number of experts"
            )
        if self.num_experts * self.rank > MAX_WIDTH:
            raise PlanError(
                f"{self.site} has {self.num_experts} LoRA experts of rank {self.rank}.\n"
                f"  fix:  give fewer experts or a lower rank: experts times rank may be at most {MAX_WIDTH}"
            )

    @property
    def is_routed(self) -> bool:
        """Whether the adapter has a router of its own: then its gate depends on the input, and it cannot be merged."""
        return self.num_experts > 1

    def num_router_parameters(self, site: Site) -> int:
        """Count the weights of the router over the LoRA experts, where there is one."""
        return self.num_experts * site.in_features if self.is_routed else 0

    def num_b_entries(self, site: Site) -> int:
        """Count the entries of B, of all LoRA experts, kept or not."""
        return self.num_experts * self.rank * site.out_features

    def num_parameters(self, site: Site) -> int:
        """Count the factors of all LoRA experts, whole, and the router where there is one.

        Args:
            site: The site, for its widths.

        Returns:
            The number of parameters.
        """
        return self.num_experts * site.num_parameters(self.rank) + self.num_router_parameters(site)


@validated_dataclass(frozen=True, config=_STRICT)
class PlacementGroup:
    """Placements that differ in their site alone, their names written with braces: ``a.{0,3}.{gate,up}``."""

    rank: WholeNumber
    alpha: AnyFloat
    sites: list[str]
    num_experts: WholeNumber = 1
    top_k: WholeNumber = 1
    sparsity: AnyFloat = 0.0

    def settings(self) -> dict[str, Any]:
        """Give everything but the sites."""
        return {name: getattr(self, name) for name in ("rank", "alpha", "num_experts", "top_k", "sparsity")}


@validated_dataclass(frozen=True, config=_STRICT)
class _PlanFile:
    """The plan's JSON, field by field."""

    schema_version: WholeNumber
    method: str
    options: dict[str, Any]
    rank: WholeNumber
    alpha: AnyFloat
    seed: StrictInt
    model: str
    base_model: str | None
    fingerprint: str
    profile_digest: str | None
    cost: dict[str, Any]
    placements: list[PlacementGroup]
    seal: str


@dataclass(frozen=True)
class Plan:
    """Which sites of one model get which adapter, how that was decided, and what it costs.

    Args:
        method: The method's name.
        options: The method's options, complete with defaults.
        rank: The default rank.
        alpha: The default scale numerator.
        seed: Seed of methods that draw at random.
        model: The model in words, for messages.
        base_model: Where the profiled model came from (``embedded``, a hub id, a path), if known.
        fingerprint: The architecture that the plan is for.
        profile_digest: Digest of the profile that the plan was made from, if any.
        cost: Exact cost.
        placements: One entry a site, in the layout's order.
    """

    method: str
    options: dict[str, Any]
    rank: int
    alpha: float
    seed: int
    model: str
    base_model: str | None
    fingerprint: str
    profile_digest: str | None
    cost: Cost
    placements: tuple[Placement, ...] = field(repr=False)

    @cached_property
    def by_site(self) -> dict[str, Placement]:
        """Map the sites' names to their placements."""
        return {placement.site: placement for placement in self.placements}

    @property
    def is_sparse(self) -> bool:
        """Whether some site keeps a part of its B alone; its A is then frozen."""
        return any(placement.sparsity for placement in self.placements)

    @property
    def is_mergeable(self) -> bool:
        """Whether the adapters can be folded into the weights: no gate may depend on the input."""
        return not any(placement.is_routed for placement in self.placements)

    @property
    def num_lora_experts(self) -> int:
        """LoRA experts over all sites; a plain LoRA counts as one."""
        return sum(placement.num_experts for placement in self.placements)

    def experts_by_layer(self) -> dict[str, list[int]]:
        """For each experts module with planned experts, their ids in rising order."""
        found: dict[str, set[int]] = {}
        for placement in self.placements:
            match = re.fullmatch(r"(.+\.experts)\.(\d+)\.[^.]+", placement.site)
            if match:
                found.setdefault(match[1], set()).add(int(match[2]))
        return {name: sorted(ids) for name, ids in found.items()}

    def as_dict(self) -> dict[str, Any]:
        """Give plain data, as in the file."""
        data = {
            "schema_version": SCHEMA_VERSION,
            **{
                name: getattr(self, name)
                for name in ("method", "options", "rank", "alpha", "seed", "model", "base_model")
            },
            "fingerprint": self.fingerprint,
            "profile_digest": self.profile_digest,
            "cost": self.cost.as_dict(),
            "placements": [asdict(group) for group in group_placements(self.placements)],
        }
        return data | {"seal": seal(data)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_text(path, json.dumps(self.as_dict(), indent=1) + "\n")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Rebuild a plan from `as_dict` and check that it is whole.

        Args:
            data: Plain data.

        Returns:
            The plan.

        Raises:
            PlanError: a field is missing, unknown or of the wrong type, the schema is another, the contents do not
                match the seal, or they ask for what no adapter can be.
        """
        try:
            check_depth(data)
            file = _validator().validate_python(data)
        except JsonError as error:
            raise PlanError(f"it is no valid plan.\n  found:  {error}") from error
        except ValidationError as error:
            place, problem = first_problem(error)
            raise PlanError(f"it is no valid plan.\n  place:  {place}\n  found:  {problem}") from error
        if file.schema_version != SCHEMA_VERSION:
            raise PlanError(
                f"it has schema version {shortened(str(file.schema_version))}; this apportion reads {SCHEMA_VERSION}."
            )
        if file.seal != seal({name: value for name, value in data.items() if name != "seal"}):
            raise PlanError("it was changed after it was written: its contents do not match its seal.")
        _check_size("the plan", file.rank, file.alpha)
        _check_number_of_sites(file.placements)
        placements = tuple(
            Placement(site=site, **group.settings())
            for group in file.placements
            for pattern in group.sites
            for site in expand_braces(pattern)
        )
        _check_no_site_twice(placements)
        return cls(
            **{
                name: getattr(file, name)
                for name in ("method", "options", "rank", "alpha", "seed", "model", "base_model")
            },
            fingerprint=file.fingerprint,
            profile_digest=file.profile_digest,
            cost=Cost.from_dict(file.cost),
            placements=placements,
        )


@cache
def _validator() -> TypeAdapter[_PlanFile]:
    """Prepare the check of a plan's fields."""
    return TypeAdapter(_PlanFile)


def _check_size(owner: str, rank: int, alpha: float) -> None:
    """Refuse a rank that no matrix has, and a scale that float32 cannot hold."""
    if not 1 <= rank <= MAX_WIDTH:
        raise PlanError(f"{owner} has rank {rank}.\n  fix:  give a whole number from 1 to {MAX_WIDTH}")
    if not SMALLEST_SCALE <= alpha / rank <= LARGEST_SCALE:
        raise PlanError(
            f"{owner} has alpha {alpha} and rank {rank}: float32 cannot hold the scale alpha / rank.\n"
            "  fix:  give an alpha near the rank, such as twice the rank"
        )


def _check_number_of_sites(groups: Sequence[PlacementGroup]) -> None:
    """Count what the lines of a plan stand for, before any of it is made."""
    total = 0
    for number, group in enumerate(groups):
        for line, pattern in enumerate(group.sites):
            place = f"placements.{number}.sites.{line}"
            shown = shortened(pattern)
            try:
                total += num_expanded(pattern)
            except PlanError as error:
                raise PlanError(
                    f"a line of it names no sites: {error}.\n  place:  {place}\n  found:  {shown}"
                ) from error
            if total > MAX_SITES:
                raise PlanError(
                    f"it names more than {MAX_SITES:,} sites, which no model has.\n  place:  {place}\n  found:  {shown}"
                )


def _check_no_site_twice(placements: Sequence[Placement]) -> None:
    """Refuse two adapters at one site."""
    site, count = next(iter(Counter(placement.site for placement in placements).most_common(1)), ("", 0))
    if count > 1:
        raise PlanError(f"it names a site {count} times.\n  place:  placements\n  found:  {shortened(site)}")


def num_kept_entries(placements: Iterable[Placement], sites: Mapping[str, Site]) -> int:
    """Count the entries of B that sparse placements keep.

    Of each sparsity, that is the share of all its sites' entries together, rounded up.

    Args:
        placements: Placements, sparse or not.
        sites: The model's sites by name.

    Returns:
        The number of entries.
    """
    entries: Counter[float] = Counter()
    for placement in placements:
        entries[placement.sparsity] += placement.num_b_entries(sites[placement.site])
    return sum(num_kept(count, sparsity) for sparsity, count in entries.items() if sparsity)


def num_kept(entries: int, sparsity: float) -> int:
    """Count what a sparsity leaves of a number of entries, rounded up.

    Args:
        entries: Entries.
        sparsity: Share that is left out.

    Returns:
        Entries that are kept.

    Example:
        >>> num_kept(21_004_288, 0.9)
        2100429
    """
    return math.ceil(round((1 - sparsity) * entries, 6))


def num_trainable(placements: Sequence[Placement], sites: Mapping[str, Site]) -> int:
    """Count the parameters that placements train: whole factors; of sparse ones the kept entries of B; routers.

    Args:
        placements: The placements.
        sites: The model's sites by name.

    Returns:
        The number of parameters.
    """
    whole = sum(p.num_parameters(sites[p.site]) for p in placements if not p.sparsity)
    routers = sum(p.num_router_parameters(sites[p.site]) for p in placements if p.sparsity)
    return whole + routers + num_kept_entries(placements, sites)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan and check that it is whole.

    Args:
        path: A file that `Plan.save` wrote.

    Returns:
        The plan, equal to the one saved.

    Raises:
        PlanError: the file is missing, is no plan, is of another schema, or was damaged or edited.
    """
    file = Path(path)
    if not file.is_file():
        raise PlanError(
            f"there is no plan {file}.\n  fix:  make one with: apportion plan PROFILE --method NAME -o {file}"
        )
    data = read_json(
        file,
        lambda found: PlanError(f"the plan {file} is truncated or no JSON.\n  found:  {found}\n  fix:    plan again"),
    )
    try:
        return Plan.from_dict(data)
    except PlanError as error:
        raise PlanError(f"the plan {file} cannot be used: {error}\n  fix:    plan again") from error


def group_placements(placements: Iterable[Placement]) -> list[PlacementGroup]:
    """Gather placements with equal settings, with one line of braces for the experts of a layer."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for placement in placements:
        key = (placement.rank, placement.alpha, placement.num_experts, placement.top_k, placement.sparsity)
        groups.setdefault(key, []).append(placement.site)
    return [
        PlacementGroup(
            rank=rank, alpha=alpha, num_experts=experts, top_k=top_k, sparsity=sparsity, sites=fold_braces(names)
        )
        for (rank, alpha, experts, top_k, sparsity), names in groups.items()
    ]
