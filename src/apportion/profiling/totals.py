"""Running totals of one task, and the file that keeps them while a long measurement is under way."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from apportion.records.files import whole_file
from apportion.records.site import Layout

# Shapes: L layers, E experts of the widest layer.

_HEADER = "apportion_partial"
_SAVE_EVERY_S = 30.0


@dataclass
class TaskTotals:
    """What was measured of one task so far.

    Args:
        counts: Selections, int64, shape (L, E).
        mass: Summed routing weights, float64, shape (L, E).
        tokens: Real tokens seen.
        sequences: Sequences seen.
        sensitivity: Summed squared gradient norms by site.
        batches: Batches done.
        seen: Hash of these batches.
    """

    counts: Tensor
    mass: Tensor
    tokens: int = 0
    sequences: int = 0
    sensitivity: dict[str, float] = field(default_factory=dict)
    batches: int = 0
    seen: str = ""

    @classmethod
    def zeros(cls, layout: Layout) -> TaskTotals:
        """Start at nothing, wide enough for the widest layer."""
        shape = (len(layout.blocks), max((block.num_experts for block in layout.blocks), default=0))
        return cls(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.float64))

    def add_sensitivity(self, norms: dict[str, float]) -> None:
        """Add one batch's squared norms."""
        for site, value in norms.items():
            self.sensitivity[site] = self.sensitivity.get(site, 0.0) + value

    def sum_over_processes(self, device: torch.device, sites: list[str]) -> None:
        """Add up the totals of all processes, where there are several; every process gets the sums.

        Args:
            device: Where the processes' backend can see tensors.
            sites: The sites with sensitivities, the same on every process; one that had no rows brings zeros.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        on = device if dist.get_backend() == "nccl" else torch.device("cpu")

        def summed(value: Tensor) -> Tensor:
            moved = value.to(on)
            dist.all_reduce(moved)
            return moved.cpu()

        self.counts, self.mass = summed(self.counts), summed(self.mass)
        self.tokens, self.sequences = (int(value) for value in summed(torch.tensor([self.tokens, self.sequences])))
        if sites:
            own = torch.tensor([self.sensitivity.get(site, 0.0) for site in sites], dtype=torch.float64)
            self.sensitivity = dict(zip(sites, summed(own).tolist(), strict=True))


class PartialFile:
    """Totals on disk, from which a measurement that was stopped goes on.

    Args:
        path: The file, or None to keep nothing. Each process has its own.
        identity: What must be the same for the totals to be of use; of another measurement they are ignored.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: str) -> None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.path = None if path is None else Path(f"{os.fspath(path)}{f'.{rank}' if rank else ''}")
        self.identity = f"{identity}/{count}"
        self.saved_at = time.monotonic()

    def read(self) -> dict[str, TaskTotals]:
        """Give the tasks' totals; none where there is no file, or where it is of another measurement."""
        if self.path is None or not self.path.is_file():
            return {}
        try:
            with safe_open(self.path, framework="pt") as opened:
                header = json.loads((opened.metadata() or {})[_HEADER])
                if header["identity"] != self.identity:
                    return {}
                return {
                    task: TaskTotals(opened.get_tensor(f"counts/{task}"), opened.get_tensor(f"mass/{task}"), **facts)
                    for task, facts in header["tasks"].items()
                }
        except (SafetensorError, KeyError, OSError, ValueError):  # damaged: measure again
            return {}

    def keep(self, totals: Callable[[], dict[str, TaskTotals]], *, now: bool = False) -> None:
        """Write the totals, whole or not at all, unless they were written half a minute ago.

        Args:
            totals: Gives every task's totals so far.
            now: Write however long ago it was.
        """
        if self.path is None or not (now or time.monotonic() - self.saved_at > _SAVE_EVERY_S):
            return
        tasks = totals()
        tensors = {f"counts/{task}": part.counts for task, part in tasks.items()}
        tensors |= {f"mass/{task}": part.mass for task, part in tasks.items()}
        facts = ("tokens", "sequences", "sensitivity", "batches", "seen")
        header = {
            "identity": self.identity,
            "tasks": {task: {name: getattr(part, name) for name in facts} for task, part in tasks.items()},
        }
        with whole_file(self.path) as temporary:
            save_file(tensors, temporary, metadata={_HEADER: json.dumps(header)})
        self.saved_at = time.monotonic()

    def remove(self) -> None:
        """Remove the file: the measurement is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
