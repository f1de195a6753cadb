"""`Mask`: which entries of every B a sparse adapter trains, and its file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from apportion.errors import PlanError
from apportion.records.files import whole_file
from apportion.records.placement import Placement
from apportion.records.site import Site

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
        PlanError: the file is missing, is no mask, is of another schema, or was damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise PlanError(f"there is no mask {file}.\n  fix:  give the mask.safetensors that training wrote")
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {})[_HEADER])
            indices = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        digest = header.pop("digest")
        if header["schema_version"] != SCHEMA_VERSION:
            raise PlanError(f"the mask {file} has schema version {header['schema_version']}, not {SCHEMA_VERSION}.")
        if digest != _digest(header, indices):
            raise PlanError(f"the mask {file} was changed after it was written.\n  fix:  extract it again")
        shapes = {site: (int(rows), int(columns)) for site, (rows, columns) in header["shapes"].items()}
        return Mask({site: indices[site] for site in shapes}, shapes, header["a_checksum"], header["provenance"])
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"{file} is no mask, or is damaged.\n  found:  {error}\n  fix:    extract it again") from error


def b_shapes(placements: Iterable[Placement], sites: Mapping[str, Site]) -> dict[str, tuple[int, int]]:
    """Give the shape of every sparse B: (out, LoRA experts times rank)."""
    sparse = [placement for placement in placements if placement.sparsity]
    return {p.site: (sites[p.site].out_features, p.total_rank) for p in sparse}


def _digest(header: dict[str, Any], indices: Mapping[str, Tensor]) -> str:
    """Hash the header and every site's entries."""
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for site in sorted(indices):
        total.update(site.encode())
        total.update(indices[site].contiguous().numpy().tobytes())
    return total.hexdigest()
