"""`Profile`: what calibration measured, and its file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass
from safetensors.torch import save_file
from torch import Tensor

from apportion.errors import ProfileError, shortened
from apportion.records.files import whole_file
from apportion.records.json_file import parse_record
from apportion.records.numbers import Amount, Size, describe_problem
from apportion.records.site import Layout
from apportion.records.tensors import TensorFileError, digest, read_tensors

SCHEMA_VERSION = 1
PROFILE_HEADER = "apportion_profile"

# L = Mixture-of-Experts layers, E = experts of the widest layer.


@dataclass(frozen=True, eq=False)
class Profile:
    """Routing and sensitivity of one model on one or more tasks.

    Args:
        layout: The sites of the profiled model.
        counts: For each task, how often each expert was selected: int64, shape (L, E).
        routing_mass: For each task, the summed routing weights of each expert: float64, shape (L, E).
        tokens: For each task, the tokens that were counted.
        sensitivity: For each task, the squared gradient norm of each site by name; empty when not measured.
        provenance: Where the numbers come from: data, samples, versions.
    """

    layout: Layout
    counts: dict[str, Tensor]
    routing_mass: dict[str, Tensor]
    tokens: dict[str, int]
    sensitivity: dict[str, dict[str, float]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

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
        return torch.tensor([block.num_experts for block in self.layout.blocks], dtype=torch.int64)

    @property
    def fingerprint(self) -> str:
        """The architecture that was profiled."""
        return self.layout.fingerprint

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything measured: two profiles with the same digest hold the same numbers."""
        return digest(self._header(), self._tensors())

    def total_counts(self) -> Tensor:
        """Selections summed over tasks: int64, shape (L, E)."""
        return torch.stack([self.counts[task] for task in self.tasks]).sum(0)

    def total_mass(self) -> Tensor:
        """Routing mass summed over tasks: float64, shape (L, E)."""
        return torch.stack([self.routing_mass[task] for task in self.tasks]).sum(0)

    def total_tokens(self) -> int:
        """Tokens summed over tasks."""
        return sum(self.tokens.values())

    @cached_property
    def slots_per_token(self) -> dict[tuple[int, int], float]:
        """Give, for each layer and expert, the routed slots that fall on it a token: they add up to top-k."""
        counts, tokens = self.total_counts(), self.total_tokens()
        return {
            (block.layer, expert): int(counts[row, expert]) / tokens
            for row, block in enumerate(self.layout.blocks)
            for expert in range(block.num_experts)
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

    def expert_sensitivity(self) -> Tensor:
        """Sum the squared gradient norms over tasks and over each expert's matrices: float64, shape (L, E)."""
        total_LE = torch.zeros_like(self.total_mass())
        for norms in self.measured_sensitivity().values():
            for row, block in enumerate(self.layout.blocks):
                for expert in range(block.num_experts):
                    names = (block.site(expert, projection).name for projection in block.projections)
                    total_LE[row, expert] += sum(norms[name] for name in names)
        return total_LE

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
            counts={task: self.counts[task]},
            routing_mass={task: self.routing_mass[task]},
            tokens={task: self.tokens[task]},
            sensitivity={task: self.sensitivity[task]} if task in self.sensitivity else {},
            provenance=self.provenance,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as one safetensors file, whole or not at all."""
        header = self._header()
        metadata = {PROFILE_HEADER: json.dumps(header | {"digest": self.digest}), "format": "pt"}
        with whole_file(path) as temporary:
            save_file(self._tensors(), temporary, metadata=metadata)

    def _header(self) -> dict[str, Any]:
        """Give everything but the tensors as plain data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "layout": self.layout.as_dict(),
            "tokens": self.tokens,
            "sensitivity": self.sensitivity,
            "provenance": self.provenance,
        }

    def _tensors(self) -> dict[str, Tensor]:
        """Give the tensors under their names in the file."""
        return {f"counts/{task}": self.counts[task].contiguous() for task in self.tasks} | {
            f"routing_mass/{task}": self.routing_mass[task].contiguous() for task in self.tasks
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
        metadata, tensors = read_tensors(file)
    except TensorFileError as error:
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
        profile = _from_header(header, tensors)
    except ValueError as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(f"the profile {file} is damaged.", found=str(error), fix="profile again") from error
    if header.pop("digest") != digest(header, tensors):
        raise ProfileError(
            f"the profile {file} was changed after it was written: its contents do not match its digest.",
            fix="profile again",
        )
    _check_measured(file, profile)
    return profile


def check_totals(layout: Layout, counts: Tensor, mass: Tensor, sensitivity: Mapping[str, float]) -> None:
    """Refuse totals of one task that no measurement gives.

    Args:
        layout: The model's sites.
        counts: Selections: int64, shape (L, E), zero beyond a layer's own experts.
        mass: Summed routing weights: float64, of the same shape.
        sensitivity: Squared gradient norms by site.

    Raises:
        ValueError: a tensor has another type or shape than the layout's, a number is negative or not finite, or a site
            is none of the layout's.
    """
    widths = [block.num_experts for block in layout.blocks]
    shape = (len(widths), max(widths, default=0))
    for totals, dtype in ((counts, torch.int64), (mass, torch.float64)):
        if totals.dtype != dtype or totals.shape != shape:
            raise ValueError(
                f"totals of type {totals.dtype} and shape {tuple(totals.shape)}, expected {dtype} and {shape}"
            )
        if not bool((totals >= 0).all() and totals.isfinite().all()):
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


def _from_header(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> Profile:
    """Put a profile together, raising ValueError where its parts are not those of one."""
    try:
        checked = _validator().validate_python(header)
    except ValidationError as error:
        raise ValueError(describe_problem(error)) from error
    layout = Layout.from_dict(checked.layout)
    names = {f"{kind}/{task}" for kind in ("counts", "routing_mass") for task in checked.tokens}
    if names != set(tensors):
        raise ValueError(f"tensors that are missing or that no task has: {min(names ^ set(tensors))!a}")
    return Profile(
        layout=layout,
        counts={task: tensors[f"counts/{task}"] for task in checked.tokens},
        routing_mass={task: tensors[f"routing_mass/{task}"] for task in checked.tokens},
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
            check_totals(profile.layout, profile.counts[task], profile.routing_mass[task], norms)
            if task in profile.sensitivity and (missing := measurable - set(norms)):
                raise ValueError(f"no sensitivity of {min(missing)!a} for task {task!a}")
            if task in profile.sensitivity and not any(norms.values()):
                raise ValueError(f"sensitivities of task {task!a} that are all zero")
    except ValueError as error:
        raise ProfileError(
            f"the profile {file} holds what no measurement gives.", found=str(error), fix="profile again"
        ) from error
