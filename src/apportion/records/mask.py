"""`Mask`: the trained entries of each B of a sparse adapter, and its file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass
from safetensors.numpy import save_file

from apportion.errors import PlanError, shortened
from apportion.records.arrays import Array, read_arrays
from apportion.records.files import whole_file
from apportion.records.json_file import parse_record
from apportion.records.numbers import Size, describe_problem
from apportion.records.placement import Placement
from apportion.records.site import Site
from apportion.records.tensors import Tensors, arrays_of

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
_HEADER = "apportion_mask"


@dataclass(frozen=True, eq=False)
class Mask:
    """The kept entries of every B of a sparse plan.

    Args:
        indices: For each site, positions in its flattened B of shape (out, rank): int32, ascending. Accepts tensors or
            NumPy arrays, returns tensors.
        shapes: For each site, the shape of its B: (out, LoRA experts times rank).
        a_checksum: Checksum of the frozen A that the mask was made with; None if the mask fits any A.
        provenance: How the mask was made.
    """

    indices: Mapping[str, Tensor]
    shapes: dict[str, tuple[int, int]]
    a_checksum: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Store tensors as arrays, so that showing a mask does not import PyTorch."""
        object.__setattr__(self, "indices", Tensors(self.indices))

    @property
    def num_kept(self) -> int:
        """Kept entries of all sites."""
        return sum(self.kept_by_site.values())

    @property
    def kept_by_site(self) -> dict[str, int]:
        """Kept entries of each site."""
        return {site: len(positions) for site, positions in arrays_of(self.indices).items()}

    @property
    def num_entries(self) -> int:
        """Entries of all sites, kept or not."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def digest(self) -> str:
        """SHA-256 over the whole mask."""
        return _digest(self._header(), arrays_of(self.indices))

    def _header(self) -> dict[str, Any]:
        """Return everything except the positions as plain data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "shapes": self.shapes,
            "a_checksum": self.a_checksum,
            "provenance": self.provenance,
        }

    def overlap(self, other: Mask) -> dict[str, float]:
        """Compare with another mask on the sites of both.

        Args:
            other: The other mask.

        Returns:
            ``sites``, the number of compared sites; ``shared_frac``, the share of this mask's kept entries that the
            other also keeps; ``jaccard``; and ``by_chance``, the expected ``shared_frac`` of random masks.
        """
        sites = [site for site in self.indices if self.shapes[site] == other.shapes.get(site)]
        mine, theirs = arrays_of(self.indices), arrays_of(other.indices)
        num_mine = sum(len(mine[site]) for site in sites)
        num_theirs = sum(len(theirs[site]) for site in sites)
        num_shared = sum(int(np.isin(mine[site], theirs[site]).sum()) for site in sites)
        entries = sum(self.shapes[site][0] * self.shapes[site][1] for site in sites)
        return {
            "sites": len(sites),
            "shared_frac": num_shared / num_mine if num_mine else 0.0,
            "jaccard": num_shared / (num_mine + num_theirs - num_shared) if num_mine + num_theirs else 0.0,
            "by_chance": num_theirs / entries if entries else 0.0,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask to a safetensors file, atomically."""
        with whole_file(path) as temporary:
            metadata = {_HEADER: json.dumps(self._header() | {"digest": self.digest}), "format": "pt"}
            save_file(arrays_of(self.indices), temporary, metadata=metadata)


def load_mask(path: str | os.PathLike[str]) -> Mask:
    """Load a mask and verify its digest.

    Args:
        path: A file written by `Mask.save`.

    Returns:
        The mask.

    Raises:
        PlanError: the file is missing, is not a mask, has another schema, is damaged, or has invalid positions.
    """
    file = Path(path)
    if not file.is_file():
        raise PlanError(f"the mask {file} does not exist.", fix="give the mask.safetensors written by training")
    try:
        metadata, indices = read_arrays(file)
        if _HEADER not in metadata:
            raise ValueError(f"no {_HEADER} in its metadata")
        header = parse_record(metadata[_HEADER])
        version = header.get("schema_version")
        if version != SCHEMA_VERSION:
            raise PlanError(
                f"the mask {file} has an unsupported schema version.",
                expected=str(SCHEMA_VERSION),
                found=shortened(ascii(version)),
            )
        if header.pop("digest", None) != _digest(header, indices):
            raise PlanError(
                f"the mask {file} was changed after it was written: its contents do not match its digest.",
                fix="extract it again",
            )
        return _from_header(header, indices)
    except ValueError as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"{file} is not a mask, or is damaged.", found=str(error), fix="extract it again") from error


@validated_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class _Header:
    """Schema of a mask's header."""

    schema_version: int
    shapes: dict[str, tuple[Size, Size]]
    a_checksum: str | None
    provenance: dict[str, Any]


@cache
def _validator() -> TypeAdapter[_Header]:
    """Return the cached validator of a header."""
    return TypeAdapter(_Header)


def _from_header(header: dict[str, Any], indices: Mapping[str, Array]) -> Mask:
    """Build a mask; raises ValueError if its parts are invalid."""
    try:
        checked = _validator().validate_python(header)
    except ValidationError as error:
        raise ValueError(describe_problem(error)) from error
    if differing := set(checked.shapes) ^ set(indices):
        raise ValueError(f"{min(differing)!a} needs both a shape and positions, and has only one of them")
    for site, (rows, columns) in checked.shapes.items():
        if not _are_positions(indices[site], rows * columns):
            raise ValueError(f"positions of {site} are not int32, not ascending, or outside {rows} x {columns}")
    ordered = {site: indices[site] for site in checked.shapes}
    return Mask(Tensors(ordered), checked.shapes, checked.a_checksum, checked.provenance)


def _are_positions(positions: Array, num_entries: int) -> bool:
    """Return whether positions are int32, ascending and inside their matrix."""
    if positions.dtype != np.int32 or positions.ndim != 1:
        return False
    if len(positions) == 0:
        return True
    inside = bool(positions[0] >= 0) and int(positions[-1]) < num_entries
    return inside and bool((positions[1:] > positions[:-1]).all())


def b_shapes(placements: Iterable[Placement], sites: Mapping[str, Site]) -> dict[str, tuple[int, int]]:
    """Return the shape of each sparse B: (out, LoRA experts times rank)."""
    sparse = [placement for placement in placements if placement.sparsity]
    return {p.site: (sites[p.site].out_features, p.total_rank) for p in sparse}


def _digest(header: dict[str, Any], indices: Mapping[str, Array]) -> str:
    """Hash the header and the positions of every site."""
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for site in sorted(indices):
        total.update(site.encode())
        total.update(indices[site].tobytes())
    return total.hexdigest()
