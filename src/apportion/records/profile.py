"""`Profile`: measured routing and sensitivity, and its file."""

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

# L = Mixture-of-Experts layers, E = experts of the layer with the most experts.


@dataclass(frozen=True, eq=False)
class Profile:
    """Routing and sensitivity of one model on one or more tasks.

    Args:
        layout: The sites of the profiled model.
        counts: For each task, how often each expert was selected: int64, shape (L, E). Accepts tensors or NumPy arrays,
            returns tensors.
        routing_mass: For each task, the summed routing weights of each expert: float64, shape (L, E), like `counts`.
        tokens: For each task, the number of counted tokens.
        sensitivity: For each task, the squared gradient norm of each site by name; empty if not measured.
        provenance: Source of the numbers: data, samples, versions.
    """

    layout: Layout
    counts: Mapping[str, Tensor]
    routing_mass: Mapping[str, Tensor]
    tokens: dict[str, int]
    sensitivity: dict[str, dict[str, float]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Store tensors as arrays, so that planning from a file does not import PyTorch."""
        for name in ("counts", "routing_mass"):
            object.__setattr__(self, name, Tensors(getattr(self, name)))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the given order."""
        return tuple(self.tokens)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the experts modules, one per row of the counts and the mass."""
        return tuple(block.name for block in self.layout.blocks)

    @property
    def num_experts(self) -> Tensor:
        """Number of experts of each layer, which are the used columns of each row: int64, shape (L,)."""
        return as_tensor(np.array([block.num_experts for block in self.layout.blocks], dtype=np.int64))

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the profiled architecture."""
        return self.layout.fingerprint

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the whole profile."""
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
        """Routed slots per token, by layer and expert. The slots of one layer sum to top-k."""
        tokens = self.total_tokens()
        return {
            (block.layer, expert): count / tokens
            for block, row in zip(self.layout.blocks, self.counts_LE.tolist(), strict=True)
            for expert, count in enumerate(row[: block.num_experts])
        }

    def measured_sensitivity(self) -> dict[str, dict[str, float]]:
        """Return the squared gradient norms by task and site.

        Returns:
            `sensitivity`, with an entry for every task.

        Raises:
            ProfileError: a task was profiled without sensitivity.
        """
        unmeasured = [task for task in self.tasks if task not in self.sensitivity]
        if unmeasured:
            raise ProfileError(
                f"the sensitivity of task {unmeasured[0]!r} was not measured.",
                fix="profile with --sensitivity",
            )
        return self.sensitivity

    def of_task(self, task: str) -> Profile:
        """Return the profile of one task.

        Args:
            task: One of `tasks`.

        Returns:
            A profile with only this task.

        Raises:
            ProfileError: the profile does not have the task.
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
        """Write the profile to a safetensors file, atomically."""
        header = self._header()
        metadata = {PROFILE_HEADER: json.dumps(header | {"digest": self.digest}), "format": "pt"}
        with whole_file(path) as temporary:
            save_file(self._arrays(), temporary, metadata=metadata)

    def _header(self) -> dict[str, Any]:
        """Return everything except the tensors as plain data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "layout": self.layout.as_dict(),
            "tokens": self.tokens,
            "sensitivity": self.sensitivity,
            "provenance": self.provenance,
        }

    def _arrays(self) -> dict[str, Array]:
        """Return the arrays by their names in the file."""
        measured = {"counts": self.counts, "routing_mass": self.routing_mass}
        return {
            f"{name}/{task}": np.ascontiguousarray(arrays_of(values)[task])
            for name, values in measured.items()
            for task in self.tasks
        }


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Load a profile and verify its digest.

    Args:
        path: A file written by `Profile.save`.

    Returns:
        The profile, equal to the saved one.

    Raises:
        ProfileError: the file is missing, is not a profile, has another schema, or was damaged or edited.
    """
    file = Path(path)
    if not file.is_file():
        raise ProfileError(
            f"the profile {file} does not exist.", fix=f"make one: apportion profile MODEL --data DATA -o {file}"
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
            f"{file} is a safetensors file, but not a profile.", fix="give a file written by apportion profile"
        )
    try:
        header = parse_record(metadata[PROFILE_HEADER])
        version = header.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ProfileError(
                f"the profile {file} has schema version {shortened(ascii(version))}; this version of apportion reads "
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
    """Check that one task's totals are possible.

    Args:
        layout: The model's sites.
        counts: Selections: int64, shape (L, E), zero beyond each layer's number of experts.
        mass: Summed routing weights: float64, of the same shape.
        sensitivity: Squared gradient norms by site.

    Raises:
        ValueError: an array has the wrong dtype or shape, a number is negative or not finite, or a site is not in the
            layout.
    """
    widths = [block.num_experts for block in layout.blocks]
    shape = (len(widths), max(widths, default=0))
    for totals, dtype in ((counts, np.int64), (mass, np.float64)):
        if totals.dtype != dtype or totals.shape != shape:
            raise ValueError(
                f"totals have dtype {totals.dtype} and shape {totals.shape}, expected {np.dtype(dtype)} and {shape}"
            )
        if not bool((totals >= 0).all() and np.isfinite(totals).all()):
            raise ValueError("totals are negative or not finite")
        if any(bool(row_E[width:].any()) for row_E, width in zip(totals, widths, strict=True)):
            raise ValueError("totals for experts that the layer does not have")
    if not all(math.isfinite(norm) and norm >= 0 for norm in sensitivity.values()):
        raise ValueError("sensitivities are negative or not finite")
    if unknown := set(sensitivity) - set(layout.by_name):
        raise ValueError(f"sensitivity for {min(unknown)!a}, which the model does not have")


@validated_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class _Header:
    """Schema of a profile's header."""

    schema_version: int
    layout: dict[str, Any]
    tokens: dict[str, Size]
    sensitivity: dict[str, dict[str, Amount]]
    provenance: dict[str, Any]
    digest: str


@cache
def _validator() -> TypeAdapter[_Header]:
    """Return the cached validator of a header."""
    return TypeAdapter(_Header)


def _from_header(header: dict[str, Any], arrays: Mapping[str, Array]) -> Profile:
    """Build a profile; raises ValueError if its parts are invalid."""
    try:
        checked = _validator().validate_python(header)
    except ValidationError as error:
        raise ValueError(describe_problem(error)) from error
    layout = Layout.from_dict(checked.layout)
    names = {f"{kind}/{task}" for kind in ("counts", "routing_mass") for task in checked.tokens}
    if names != set(arrays):
        raise ValueError(f"tensors are missing or belong to no task: {min(names ^ set(arrays))!a}")
    return Profile(
        layout=layout,
        counts=Tensors({task: arrays[f"counts/{task}"] for task in checked.tokens}),
        routing_mass=Tensors({task: arrays[f"routing_mass/{task}"] for task in checked.tokens}),
        tokens=checked.tokens,
        sensitivity=checked.sensitivity,
        provenance=checked.provenance,
    )


def _check_measured(file: Path, profile: Profile) -> None:
    """Refuse impossible measurements, even if the digest matches."""
    measurable = {site.name for site in profile.layout.sites() if site.storage != "weight"}
    try:
        if unknown := set(profile.sensitivity) - set(profile.tasks):
            raise ValueError(f"sensitivity for task {min(unknown)!a}, which the profile does not have")
        for task in profile.tasks:
            norms = profile.sensitivity.get(task, {})
            counts, mass = arrays_of(profile.counts)[task], arrays_of(profile.routing_mass)[task]
            check_totals(profile.layout, counts, mass, norms)
            if task in profile.sensitivity and (missing := measurable - set(norms)):
                raise ValueError(f"no sensitivity for {min(missing)!a} in task {task!a}")
            if task in profile.sensitivity and not any(norms.values()):
                raise ValueError(f"sensitivities of task {task!a} are all zero")
    except ValueError as error:
        raise ProfileError(
            f"the profile {file} has impossible measurements.", found=str(error), fix="profile again"
        ) from error
