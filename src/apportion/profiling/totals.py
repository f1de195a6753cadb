"""Running totals of one task, and the file that stores them during a long measurement."""

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
_FACTS = ("tokens", "sequences", "sensitivity", "batches", "seen")  # fields per task in the file's header
_DAMAGE = (KeyError, ValueError, TypeError, AttributeError)


@dataclass
class TaskTotals:
    """Totals of one task so far.

    Args:
        counts: Numbers of selections, int64, shape (L, E).
        mass: Summed routing weights, float64, shape (L, E).
        tokens: Number of tokens, without padding.
        sequences: Number of sequences.
        sensitivity: Summed squared gradient norms by site.
        batches: Number of batches measured.
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
        """Return zero totals, wide enough for the widest layer."""
        shape = (len(layout.blocks), max((block.num_experts for block in layout.blocks), default=0))
        return cls(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.float64))

    def check(self, layout: Layout) -> None:
        """Check that the totals are possible.

        Args:
            layout: The model's sites.

        Raises:
            ValueError: a tensor has the wrong type or shape, or a number is negative or not finite.
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
        """Sum the totals over all processes. Every process gets the sums.

        Args:
            device: Device for the NCCL backend.
            sites: The sites with sensitivities, the same on every process. A process without rows contributes zeros.
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
            local = torch.tensor([self.sensitivity.get(site, 0.0) for site in sites], dtype=torch.float64)
            self.sensitivity = dict(zip(sites, summed(local).tolist(), strict=True))


class PartialFile:
    """Totals on disk, from which an interrupted measurement resumes.

    Args:
        path: The file, or None to store nothing. Each process has its own file.
        identity: Identity of the measurement. Totals with another identity are ignored.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: str) -> None:
        count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.path = None if path is None else own_partial(path)
        self.identity = f"{identity}/{count}"
        self.saved_at = time.monotonic()

    def read(self, layout: Layout) -> dict[str, TaskTotals]:
        """Read the tasks' totals.

        Args:
            layout: The model's sites.

        Returns:
            Totals by task. Empty if there is no file, it belongs to another measurement, or (with a warning) it is
            damaged.
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
        """Read the file. If it is damaged, any error in `_DAMAGE` may be raised."""
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
        """Write the totals atomically, unless they were written less than half a minute ago.

        Args:
            totals: Returns every task's totals so far.
            now: Write regardless of the last time.
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
    """Return the path of this process's file of partial totals.

    Args:
        path: The `partial` argument of `profile`.

    Returns:
        The same path on the first process; other processes append their rank.
    """
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return Path(f"{os.fspath(path)}{f'.{rank}' if rank else ''}")


def remove_partial(path: str | os.PathLike[str]) -> None:
    """Remove this process's file of partial totals, if it exists.

    Args:
        path: The `partial` argument of `profile`.
    """
    own_partial(path).unlink(missing_ok=True)
