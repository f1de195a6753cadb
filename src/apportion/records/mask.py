"""`Mask`: which entries of every B a sparse adapter trains, and its file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass
from safetensors.torch import save_file
from torch import Tensor

from apportion.errors import PlanError, shortened
from apportion.records.files import whole_file
from apportion.records.json_file import parse_record
from apportion.records.numbers import Size, describe_problem
from apportion.records.placement import Placement
from apportion.records.site import Site
from apportion.records.tensors import read_tensors

SCHEMA_VERSION = 1
_HEADER = "apportion_mask"


@dataclass(frozen=True, eq=False)
class Mask:
    """The kept entries of every B of a sparse plan.

    Args:
        indices: For each site, positions in its B of shape (out, rank) laid out row by row: rising, int32.
        shapes: For each site, the shape of its B: (out, LoRA experts times rank).
        a_checksum: Checksum of the frozen A that the mask was made with; None where it fits any.
        provenance: How it was made.
    """

    indices: dict[str, Tensor]
    shapes: dict[str, tuple[int, int]]
    a_checksum: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def num_kept(self) -> int:
        """Kept entries of all sites."""
        return sum(len(kept) for kept in self.indices.values())

    @property
    def num_entries(self) -> int:
        """Entries of all sites, kept or not."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def digest(self) -> str:
        """SHA-256 over the whole mask."""
        return _digest(self._header(), self.indices)

    def _header(self) -> dict[str, Any]:
        """Give everything but the entries as plain data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "shapes": self.shapes,
            "a_checksum": self.a_checksum,
            "provenance": self.provenance,
        }

    def overlap(self, other: Mask) -> dict[str, float]:
        """Compare with another mask on the sites that both have.

        Args:
            other: The other mask.

        Returns:
            ``shared_frac``, the share of this mask's kept entries there that the other keeps too; ``jaccard``; and
            ``by_chance``, the share that two random masks of these sizes would have.
        """
        sites = [site for site in self.indices if self.shapes[site] == other.shapes.get(site)]
        own = sum(len(self.indices[site]) for site in sites)
        others = sum(len(other.indices[site]) for site in sites)
        both = sum(int(torch.isin(self.indices[site], other.indices[site]).sum()) for site in sites)
        entries = sum(self.shapes[site][0] * self.shapes[site][1] for site in sites)
        return {
            "sites": len(sites),
            "shared_frac": both / own if own else 0.0,
            "jaccard": both / (own + others - both) if own + others else 0.0,
            "by_chance": others / entries if entries else 0.0,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as one safetensors file, whole or not at all."""
        with whole_file(path) as temporary:
            metadata = {_HEADER: json.dumps(self._header() | {"digest": self.digest}), "format": "pt"}
            save_file({site: kept.contiguous() for site, kept in self.indices.items()}, temporary, metadata=metadata)


def load_mask(path: str | os.PathLike[str]) -> Mask:
    """Read a mask and check that it is whole.

    Args:
        path: A file that `Mask.save` wrote.

    Returns:
        The mask.

    Raises:
        PlanError: the file is missing, is no mask, is of another schema, was damaged, or holds impossible positions.
    """
    file = Path(path)
    if not file.is_file():
        raise PlanError(f"there is no mask {file}.", fix="give the mask.safetensors that training wrote")
    try:
        metadata, indices = read_tensors(file)
        if _HEADER not in metadata:
            raise ValueError(f"no {_HEADER} in its metadata")
        header = parse_record(metadata[_HEADER])
        version = header.get("schema_version")
        if version != SCHEMA_VERSION:
            raise PlanError(f"the mask {file} has schema version {shortened(ascii(version))}, not {SCHEMA_VERSION}.")
        if header.pop("digest", None) != _digest(header, indices):
            raise PlanError(f"the mask {file} was changed after it was written.", fix="extract it again")
        return _from_header(header, indices)
    except ValueError as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"{file} is no mask, or is damaged.", found=str(error), fix="extract it again") from error


@validated_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class _Header:
    """A mask's header, field by field."""

    schema_version: int
    shapes: dict[str, tuple[Size, Size]]
    a_checksum: str | None
    provenance: dict[str, Any]


@cache
def _validator() -> TypeAdapter[_Header]:
    """Prepare the check of a header's fields."""
    return TypeAdapter(_Header)


def _from_header(header: dict[str, Any], indices: Mapping[str, Tensor]) -> Mask:
    """Put a mask together, raising ValueError where its parts are not those of one."""
    try:
        checked = _validator().validate_python(header)
    except ValidationError as error:
        raise ValueError(describe_problem(error)) from error
    if differing := set(checked.shapes) ^ set(indices):
        raise ValueError(f"{min(differing)!a} has either a shape or positions, not both")
    for site, (rows, columns) in checked.shapes.items():
        if not _are_positions(indices[site], rows * columns):
            raise ValueError(f"positions of {site} that are not int32, not rising, or outside {rows} x {columns}")
    ordered = {site: indices[site] for site in checked.shapes}
    return Mask(ordered, checked.shapes, checked.a_checksum, checked.provenance)


def _are_positions(kept: Tensor, num_entries: int) -> bool:
    """Tell whether kept entries rise within their matrix."""
    if kept.dtype != torch.int32 or kept.ndim != 1:
        return False
    if len(kept) == 0:
        return True
    return bool(kept[0] >= 0) and int(kept[-1]) < num_entries and bool((kept[1:] > kept[:-1]).all())


def b_shapes(placements: Iterable[Placement], sites: Mapping[str, Site]) -> dict[str, tuple[int, int]]:
    """Give the shape of every sparse B: (out, LoRA experts times rank)."""
    sparse = [placement for placement in placements if placement.sparsity]
    return {p.site: (sites[p.site].out_features, p.total_rank) for p in sparse}


def _digest(header: dict[str, Any], indices: Mapping[str, Tensor]) -> str:
    """Hash the header and every site's entries."""
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for site in sorted(indices):
        total.update(site.encode())
        total.update(indices[site].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
