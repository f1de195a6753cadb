"""Running totals of one task, and the file that keeps them while a long measurement is under way."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.numpy import save_file
from torch import Tensor

from apportion.errors import ApportionWarning, lay_out
from apportion.records.arrays import digest, read_arrays
from apportion.records.files import whole_file
from apportion.records.json_file import parse_record
from apportion.records.profile import check_totals
from apportion.records.site import Layout
from apportion.records.tensors import as_tensor

# Shapes: L layers, E experts of the widest layer.

_HEADER = "apportion_partial"
_SAVE_EVERY_S = 30.0
_FACTS = ("tokens", "sequences", "sensitivity", "batches", "seen")  # what a file's header has of each task
_DAMAGE = (KeyError, ValueError, TypeError, AttributeError)


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

    def check(self, layout: Layout) -> None:
        """Refuse what no measurement gives.

        Args:
            layout: The model's sites.

        Raises:
            ValueError: a tensor has another type or shape than the layout's, or a number is negative or not finite.
        """
        check_totals(layout, self.counts.numpy(), self.mass.numpy(), self.sensitivity)
        numbers = (self.tokens, self.sequences, self.batches)
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"numbers of tokens, sequences and batches {numbers}")

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
        count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.path = None if path is None else own_partial(path)
        self.identity = f"{identity}/{count}"
        self.saved_at = time.monotonic()

    def read(self, layout: Layout) -> dict[str, TaskTotals]:
        """Give the tasks' totals; none where there is no file, or where it is damaged or of another measurement.

        Args:
            layout: The model's sites.

        Returns:
            Totals by task. A file that is damaged gives none, and a warning that names it.
        """
        if self.path is None or not self.path.is_file():
            return {}
        try:
            return self._read(self.path, layout)
        except _DAMAGE as error:
            warnings.warn(
                lay_out(
                    f"the totals in {self.path} cannot be used, so everything is measured again.",
                    {"found": str(error)},
                ),
                ApportionWarning,
                stacklevel=2,
            )
            return {}

    def _read(self, path: Path, layout: Layout) -> dict[str, TaskTotals]:
        """Read the file, raising whatever its damage leads to."""
        metadata, arrays = read_arrays(path)
        header = parse_record(metadata[_HEADER])
        if header.pop("digest") != digest(header, arrays):
            raise ValueError("contents that do not match their digest")
        if header["identity"] != self.identity:
            return {}
        measured = {
            task: TaskTotals(
                as_tensor(arrays[f"counts/{task}"]),
                as_tensor(arrays[f"mass/{task}"]),
                **{name: facts[name] for name in _FACTS},
            )
            for task, facts in header["tasks"].items()
        }
        for totals in measured.values():
            totals.check(layout)
        return measured

    def keep(self, totals: Callable[[], dict[str, TaskTotals]], *, now: bool = False) -> None:
        """Write the totals, whole or not at all, unless they were written half a minute ago.

        Args:
            totals: Gives every task's totals so far.
            now: Write however long ago it was.
        """
        if self.path is None or not (now or time.monotonic() - self.saved_at > _SAVE_EVERY_S):
            return
        tasks = totals()
        arrays = {f"counts/{task}": part.counts.numpy() for task, part in tasks.items()}
        arrays |= {f"mass/{task}": part.mass.numpy() for task, part in tasks.items()}
        header = {
            "identity": self.identity,
            "tasks": {task: {name: getattr(part, name) for name in _FACTS} for task, part in tasks.items()},
        }
        metadata = {_HEADER: json.dumps(header | {"digest": digest(header, arrays)})}
        with whole_file(self.path) as temporary:
            save_file(arrays, temporary, metadata=metadata)
        self.saved_at = time.monotonic()


def own_partial(path: str | os.PathLike[str]) -> Path:
    """Give the file of partial totals that this process writes.

    Args:
        path: The file's name, as `profile` was given it.

    Returns:
        The same on a single process and on the first of several; the others add their number.
    """
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return Path(f"{os.fspath(path)}{f'.{rank}' if rank else ''}")


def remove_partial(path: str | os.PathLike[str]) -> None:
    """Remove this process's file of partial totals, if there is one.

    Args:
        path: The file's name, as `profile` was given it.
    """
    own_partial(path).unlink(missing_ok=True)
