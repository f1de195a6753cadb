"""`Profile`: what calibration measured, and its file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass
from safetensors.numpy import save_file

from apportion.errors import ProfileError, shortened
from apportion.records.arrays import Array, ArrayFileError, digest, read_arrays
from apportion.records.files import whole_file
from apportion.records.json_file import parse_record
from apportion.records.numbers import Amount, Size, describe_problem
from apportion.records.site import Layout
from apportion.records.tensors import Tensors, arrays_of, as_tensor

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
PROFILE_HEADER = "apportion_profile"

# L = Mixture-of-Experts layers, E = experts of the widest layer.


@dataclass(frozen=True, eq=False)
class Profile:
    """Routing and sensitivity of one model on one or more tasks.

    Args:
        layout: The sites of the profiled model.
        counts: For each task, how often each expert was selected: int64, shape (L, E). Tensors or NumPy arrays are
            taken; tensors are given.
        routing_mass: For each task, the summed routing weights of each expert: float64, shape (L, E); as `counts`.
        tokens: For each task, the tokens that were counted.
        sensitivity: For each task, the squared gradient norm of each site by name; empty when not measured.
        provenance: Where the numbers come from: data, samples, versions.
    """

    layout: Layout
    counts: Mapping[str, Tensor]
    routing_mass: Mapping[str, Tensor]
    tokens: dict[str, int]
    sensitivity: dict[str, dict[str, float]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Hold tensors as arrays, so that planning from a file takes no PyTorch."""
        for name in ("counts", "routing_mass"):
            object.__setattr__(self, name, Tensors(getattr(self, name)))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in the order given."""
        return tuple(self.tokens)

    @property
    def layers(self) -> tuple[str, ...]:
        """The experts modules that the rows of counts and mass stand for."""
        return tuple(block.name for block in self.layout.blocks)

    @property
    def num_experts(self) -> Tensor:
        """How many columns of each row count: int64, shape (L,)."""
        return as_tensor(np.array([block.num_experts for block in self.layout.blocks], dtype=np.int64))

    @property
    def fingerprint(self) -> str:
        """The architecture that was profiled."""
        return self.layout.fingerprint

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything measured: two profiles with the same digest hold the same numbers."""
        return digest(self._header(), self._arrays())

    @cached_property
    def counts_LE(self) -> Array:
        """Selections summed over tasks: int64, shape (L, E)."""
        total_LE: Array = np.sum([arrays_of(self.counts)[task] for task in self.tasks], axis=0)
        return total_LE

    @cached_property
    def mass_LE(self) -> Array:
        """Routing mass summed over tasks: float64, shape (L, E)."""
        total_LE: Array = np.sum([arrays_of(self.routing_mass)[task] for task in self.tasks], axis=0)
        return total_LE

    @cached_property
    def sensitivity_LE(self) -> Array:
        """Squared gradient norms summed over tasks and over each expert's matrices: float64, shape (L, E)."""
        total_LE = np.zeros(self.mass_LE.shape)
        for norms in self.measured_sensitivity().values():
            for row, block in enumerate(self.layout.blocks):
                for expert in range(block.num_experts):
                    names = (block.site(expert, projection).name for projection in block.projections)
                    total_LE[row, expert] += sum(norms[name] for name in names)
        return total_LE

    def total_counts(self) -> Tensor:
        """Return `counts_LE` as a tensor."""
        return as_tensor(self.counts_LE)

    def total_mass(self) -> Tensor:
        """Return `mass_LE` as a tensor."""
        return as_tensor(self.mass_LE)

    def expert_sensitivity(self) -> Tensor:
        """Return `sensitivity_LE` as a tensor."""
        return as_tensor(self.sensitivity_LE)

    def total_tokens(self) -> int:
        """Tokens summed over tasks."""
        return sum(self.tokens.values())

    @cached_property
    def slots_per_token(self) -> dict[tuple[int, int], float]:
        """Give the routed slots per token of each layer and expert: those of one layer add up to top-k."""
        tokens = self.total_tokens()
        return {
            (block.layer, expert): count / tokens
            for block, row in zip(self.layout.blocks, self.counts_LE.tolist(), strict=True)
            for expert, count in enumerate(row[: block.num_experts])
        }

    def measured_sensitivity(self) -> dict[str, dict[str, float]]:
        """Give each task's squared gradient norms by site.

        Returns:
            As `sensitivity`, for every task.

        Raises:
            ProfileError: a task was profiled without gradients.
        """
        without = [task for task in self.tasks if task not in self.sensitivity]
        if without:
            raise ProfileError(
                f"the sensitivity of task {without[0]!r} was not measured.",
                fix="profile with --sensitivity, and give that profile",
            )
        return self.sensitivity

    def of_task(self, task: str) -> Profile:
        """Give the part of the profile that belongs to one task.

        Args:
            task: One of `tasks`.

        Returns:
            A profile of that task alone.

        Raises:
            ProfileError: there is no such task.
        """
        if task not in self.tokens:
            raise ProfileError(f"the profile has no task {task!r}.", found=", ".join(self.tasks))
        return Profile(
            layout=self.layout,
            counts=Tensors({task: arrays_of(self.counts)[task]}),
            routing_mass=Tensors({task: arrays_of(self.routing_mass)[task]}),
            tokens={task: self.tokens[task]},
            sensitivity={task: self.sensitivity[task]} if task in self.sensitivity else {},
            provenance=self.provenance,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as one safetensors file, whole or not at all."""
        header = self._header()
        metadata = {PROFILE_HEADER: json.dumps(header | {"digest": self.digest}), "format": "pt"}
        with whole_file(path) as temporary:
            save_file(self._arrays(), temporary, metadata=metadata)

    def _header(self) -> dict[str, Any]:
        """Give everything but the tensors as plain data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "layout": self.layout.as_dict(),
            "tokens": self.tokens,
            "sensitivity": self.sensitivity,
            "provenance": self.provenance,
        }

    def _arrays(self) -> dict[str, Array]:
        """Give the arrays under their names in the file."""
        measured = {"counts": self.counts, "routing_mass": self.routing_mass}
        return {
            f"{name}/{task}": np.ascontiguousarray(arrays_of(values)[task])
            for name, values in measured.items()
            for task in self.tasks
        }


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Read a profile and check that it is whole.

    Args:
        path: A file that `Profile.save` wrote.

    Returns:
        The profile, equal to the one saved.

    Raises:
        ProfileError: the file is missing, is no profile, is of a newer schema, or was damaged or edited.
    """
    file = Path(path)
    if not file.is_file():
        raise ProfileError(
            f"there is no profile {file}.", fix=f"make one with: apportion profile MODEL --data DATA -o {file}"
        )
    try:
        metadata, arrays = read_arrays(file)
    except ArrayFileError as error:
        raise ProfileError(
            f"the profile {file} cannot be read: it is truncated or not a safetensors file.",
            found=str(error),
            fix="profile again",
        ) from error
    if PROFILE_HEADER not in metadata:
        raise ProfileError(
            f"{file} is a safetensors file, but not a profile.", fix="give a file that apportion profile wrote"
        )
    try:
        header = parse_record(metadata[PROFILE_HEADER])
        version = header.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ProfileError(
                f"the profile {file} has schema version {shortened(ascii(version))}; this apportion reads "
                f"{SCHEMA_VERSION}.",
                fix="profile again, or install the version that wrote it",
            )
        profile = _from_header(header, arrays)
    except ValueError as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(f"the profile {file} is damaged.", found=str(error), fix="profile again") from error
    if header.pop("digest") != digest(header, arrays):
        raise ProfileError(
            f"the profile {file} was changed after it was written: its contents do not match its digest.",
            fix="profile again",
        )
    _check_measured(file, profile)
    return profile


def check_totals(layout: Layout, counts: Array, mass: Array, sensitivity: Mapping[str, float]) -> None:
    """Refuse totals of one task that no measurement gives.

    Args:
        layout: The model's sites.
        counts: Selections: int64, shape (L, E), zero beyond a layer's own experts.
        mass: Summed routing weights: float64, of the same shape.
        sensitivity: Squared gradient norms by site.

    Raises:
        ValueError: an array has another type or shape than the layout's, a number is negative or not finite, or a site
            is none of the layout's.
    """
    widths = [block.num_experts for block in layout.blocks]
    shape = (len(widths), max(widths, default=0))
    for totals, dtype in ((counts, np.int64), (mass, np.float64)):
        if totals.dtype != dtype or totals.shape != shape:
            raise ValueError(
                f"totals of type {totals.dtype} and shape {totals.shape}, expected {np.dtype(dtype)} and {shape}"
            )
        if not bool((totals >= 0).all() and np.isfinite(totals).all()):
            raise ValueError("totals that are negative or not finite")
        if any(bool(row_E[width:].any()) for row_E, width in zip(totals, widths, strict=True)):
            raise ValueError("totals of experts that their layer does not have")
    if not all(math.isfinite(norm) and norm >= 0 for norm in sensitivity.values()):
        raise ValueError("sensitivities that are negative or not finite")
    if unknown := set(sensitivity) - set(layout.by_name):
        raise ValueError(f"the sensitivity of {min(unknown)!a}, which the model lacks")


@validated_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class _Header:
    """A profile's header, field by field."""

    schema_version: int
    layout: dict[str, Any]
    tokens: dict[str, Size]
    sensitivity: dict[str, dict[str, Amount]]
    provenance: dict[str, Any]
    digest: str


@cache
def _validator() -> TypeAdapter[_Header]:
    """Prepare the check of a header's fields."""
    return TypeAdapter(_Header)


def _from_header(header: dict[str, Any], arrays: Mapping[str, Array]) -> Profile:
    """Put a profile together, raising ValueError where its parts are not those of one."""
    try:
        checked = _validator().validate_python(header)
    except ValidationError as error:
        raise ValueError(describe_problem(error)) from error
    layout = Layout.from_dict(checked.layout)
    names = {f"{kind}/{task}" for kind in ("counts", "routing_mass") for task in checked.tokens}
    if names != set(arrays):
        raise ValueError(f"tensors that are missing or that no task has: {min(names ^ set(arrays))!a}")
    return Profile(
        layout=layout,
        counts=Tensors({task: arrays[f"counts/{task}"] for task in checked.tokens}),
        routing_mass=Tensors({task: arrays[f"routing_mass/{task}"] for task in checked.tokens}),
        tokens=checked.tokens,
        sensitivity=checked.sensitivity,
        provenance=checked.provenance,
    )


def _check_measured(file: Path, profile: Profile) -> None:
    """Refuse a profile that no measurement gives, though its digest fits."""
    measurable = {site.name for site in profile.layout.sites() if site.storage != "weight"}
    try:
        if unknown := set(profile.sensitivity) - set(profile.tasks):
            raise ValueError(f"the sensitivity of a task {min(unknown)!a}, which it does not have")
        for task in profile.tasks:
            norms = profile.sensitivity.get(task, {})
            counts, mass = arrays_of(profile.counts)[task], arrays_of(profile.routing_mass)[task]
            check_totals(profile.layout, counts, mass, norms)
            if task in profile.sensitivity and (missing := measurable - set(norms)):
                raise ValueError(f"no sensitivity of {min(missing)!a} for task {task!a}")
            if task in profile.sensitivity and not any(norms.values()):
                raise ValueError(f"sensitivities of task {task!a} that are all zero")
    except ValueError as error:
        raise ProfileError(
            f"the profile {file} holds what no measurement gives.", found=str(error), fix="profile again"
        ) from error
