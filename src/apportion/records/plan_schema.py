"""The JSON schema of plans: schema 2, and schema 1 of earlier versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, StrictInt, ValidationError

from apportion.errors import PlanError, shortened
from apportion.records.braces import expand_braces, num_expanded
from apportion.records.cost import Cost
from apportion.records.files import seal
from apportion.records.json_file import JsonError, check_depth
from apportion.records.numbers import AnyFloat, WholeNumber, first_problem
from apportion.records.placement import Placement, group_placements
from apportion.records.shapes.registry import lora_shape, shape_as_dict, shape_from_dict
from apportion.records.site import MAX_SITES

SCHEMA_VERSION = 2
_HEAD = ("method", "options", "rank", "alpha", "seed", "model", "base_model", "fingerprint", "profile_digest")


class _Strict(BaseModel):
    """Base model that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


class _File(_Strict):
    """Fields of both schemas."""

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
    seal: str


class _Group1(_Strict):
    """Placements of one shape in schema 1."""

    rank: WholeNumber
    alpha: AnyFloat
    sites: list[str]
    num_experts: WholeNumber = 1
    top_k: WholeNumber = 1
    sparsity: AnyFloat = 0.0


class _Group2(_Strict):
    """Placements of one shape in schema 2."""

    shape: dict[str, Any]
    sites: list[str]


class _Procedure(BaseModel):
    """Training procedure: its name and its arguments."""

    model_config = ConfigDict(extra="allow")

    name: str


class _File1(_File):
    """Schema 1."""

    placements: list[_Group1]


class _File2(_File):
    """Schema 2."""

    procedure: _Procedure
    derived_from: list[str]
    placements: list[_Group2]


def write_schema(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan as plain data in the current schema.

    Args:
        values: The plan's fields by name.

    Returns:
        Plain data, including the seal.
    """
    data = {
        "schema_version": SCHEMA_VERSION,
        **{name: values[name] for name in _HEAD},
        "procedure": values["procedure"],
        "derived_from": list(values["derived_from"]),
        "cost": values["cost"].as_dict(),
        "placements": [
            {"shape": shape_as_dict(group.shape), "sites": list(group.sites)}
            for group in group_placements(values["placements"])
        ],
    }
    return data | {"seal": seal(data)}


def seal_of_schema_1(values: Mapping[str, Any]) -> str:
    """Return the seal of a plan under schema 1, which runs of earlier versions refer to.

    Args:
        values: The plan's fields by name.

    Returns:
        The seal.
    """
    groups: dict[tuple[Any, ...], list[Placement]] = {}
    for p in values["placements"]:
        groups.setdefault((p.rank, p.alpha, p.num_experts, p.top_k, p.sparsity), []).append(p)
    names = ("rank", "alpha", "sites", "num_experts", "top_k", "sparsity")
    placements = [
        dict(zip(names, (*key[:2], list(group_placements(group)[0].sites), *key[2:]), strict=True))
        for key, group in groups.items()
    ]
    cost = {name: value for name, value in values["cost"].as_dict().items() if name != "frozen_parameters"}
    head = {name: values[name] for name in _HEAD}
    return seal({"schema_version": 1, **head, "cost": cost, "placements": placements})


def read_schema(data: Any) -> dict[str, Any]:
    """Validate a plan's plain data of either schema, and verify the seal.

    Args:
        data: Plain data.

    Returns:
        The plan's fields by name.

    Raises:
        PlanError: a field is missing, unknown or of the wrong type, the schema is not supported, the contents do not
            match the seal, or an adapter is impossible.
    """
    if not isinstance(data, Mapping):
        raise PlanError("it is not a plan.", expected="an object", found=f"a {type(data).__name__}")
    version = data.get("schema_version")
    if version not in (1, SCHEMA_VERSION):
        raise PlanError(
            f"it has schema version {shortened(str(version))}; this version of apportion reads 1 and {SCHEMA_VERSION}."
        )
    try:
        check_depth(data)
        file: _File1 | _File2 = (_File1 if version == 1 else _File2).model_validate(data)
    except JsonError as error:
        raise PlanError("it is not a valid plan.", found=str(error)) from error
    except ValidationError as error:
        place, problem = first_problem(error)
        raise PlanError("it is not a valid plan.", place=place, found=str(problem)) from error
    if file.seal != seal({name: value for name, value in data.items() if name != "seal"}):
        raise PlanError("it was changed after it was written: its contents do not match its seal.")
    lora_shape(file.rank, file.alpha)
    groups: Sequence[_Group1 | _Group2] = file.placements
    _check_number_of_sites([group.sites for group in groups])
    placements = tuple(one for number, group in enumerate(groups) for one in _placements(number, group))
    _check_no_site_twice(placements)
    earlier = {"name": "lori" if any(placement.sparsity for placement in placements) else "plain"}
    return {name: getattr(file, name) for name in _HEAD} | {
        "cost": Cost.from_dict({"frozen_parameters": None} | file.cost),
        "placements": placements,
        "procedure": file.procedure.model_dump() if isinstance(file, _File2) else earlier,
        "derived_from": tuple(file.derived_from) if isinstance(file, _File2) else (),
    }


def in_file_order(placements: Iterable[Placement]) -> tuple[Placement, ...]:
    """Sort placements into the order of a plan's file, so that a loaded plan equals the saved one.

    Args:
        placements: The placements.

    Returns:
        The sorted placements.
    """
    return tuple(
        Placement(site, group.shape)
        for group in group_placements(placements)
        for pattern in group.sites
        for site in expand_braces(pattern)
    )


def _placements(number: int, group: _Group1 | _Group2) -> list[Placement]:
    """Return the placements of a group."""
    try:
        shape = shape_from_dict(group.shape) if isinstance(group, _Group2) else lora_shape(
            group.rank, group.alpha, num_experts=group.num_experts, top_k=group.top_k, sparsity=group.sparsity
        )  # fmt: skip
    except PlanError as error:
        raise error.at(f"placements.{number}") from error
    return [Placement(site, shape) for pattern in group.sites for site in expand_braces(pattern)]


def _check_number_of_sites(groups: Sequence[Sequence[str]]) -> None:
    """Refuse plans with too many sites, before the site names are expanded."""
    total = 0
    for number, patterns in enumerate(groups):
        for line, pattern in enumerate(patterns):
            place = f"placements.{number}.sites.{line}"
            shown = shortened(pattern)
            try:
                total += num_expanded(pattern)
            except PlanError as error:
                raise PlanError(f"it has an invalid site pattern: {error}.", place=place, found=shown) from error
            if total > MAX_SITES:
                raise PlanError(f"it has more than {MAX_SITES:,} sites, more than any model.", place=place, found=shown)


def _check_no_site_twice(placements: Sequence[Placement]) -> None:
    """Refuse several adapters at one site."""
    site, count = next(iter(Counter(placement.site for placement in placements).most_common(1)), ("", 0))
    if count > 1:
        raise PlanError(f"it lists a site {count} times.", place="placements", found=shortened(site))
