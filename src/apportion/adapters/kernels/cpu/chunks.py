"""Experts that run together: few enough rows for the cache, enough to keep small operations few."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

# Shapes: C rows of a chunk, B experts of a chunk, n rows of each in a batch, W any width.

_CHUNK_ROWS = 1024  # rows that run together: enough to keep small operations few, few enough for the cache
_SPARE_ROWS = 16  # as many may fill the room of an expert in a batch, or an eighth of it


@dataclass
class Chunk:
    """Experts that run together: some without any term, or some with the same terms and as many rows each.

    Args:
        start: The first one's first row.
        pattern: Which terms stand on them: bit n for the pass's term n.
        room: Rows of each; None where each has its own number.
        experts: Ids.
        ends: Where each one's rows end.
        terms: For each term that stands on them, where they are among its experts in this pass.
    """

    start: int
    pattern: int
    room: int | None
    experts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    terms: dict[int, slice] = field(default_factory=dict)

    @classmethod
    def open_for(cls, size: int, pattern: int, start: int) -> Chunk:
        """Start a chunk with room for experts of about so many rows, with such terms."""
        return cls(start, pattern, whole_blocks(size) if pattern else None)

    def takes(self, size: int, pattern: int) -> bool:
        """Return whether an expert with so many rows and such terms belongs here too."""
        if pattern != self.pattern or (self.ends and self.ends[-1] - self.start >= _CHUNK_ROWS):
            return False
        return self.room is None or self.room - size <= max(_SPARE_ROWS, self.room // 8)

    def add(self, expert: int, size: int) -> int:
        """Assign rows to an expert, and return how many they are."""
        room = whole_blocks(size) if self.room is None else self.room
        self.experts.append(expert)
        self.ends.append((self.ends[-1] if self.ends else self.start) + room)
        return room

    @cached_property
    def window(self) -> slice:
        """The chunk's rows."""
        return slice(self.start, self.ends[-1])

    @cached_property
    def sizes(self) -> list[int]:
        """The rows of each expert."""
        return [last - first for first, last in itertools.pairwise((self.start, *self.ends))]

    def cut(self, rows_CW: Tensor) -> tuple[Tensor, ...]:
        """Cut the rows of the chunk's window into its experts'."""
        return torch.split_with_sizes(rows_CW, self.sizes)

    def batch(self, rows_CW: Tensor) -> Tensor:
        """Return the rows of the chunk's window as a batch of experts, each with its rows: (B, n, W)."""
        return rows_CW.view(len(self.experts), -1, rows_CW.shape[-1])


def whole_blocks(size: int) -> int:
    """Round a number of rows up, by a sixteenth at most from 64 on, so that oneDNN prepares products of few shapes.

    Args:
        size: The rows of an expert.

    Returns:
        At least as many.

    Example:
        >>> [whole_blocks(size) for size in (0, 1, 3, 5, 65, 129, 1000)]
        [0, 1, 3, 8, 68, 136, 1024]
    """
    block = 1 if size < 4 else max(4, 1 << max(size.bit_length() - 5, 0))
    return -(-size // block) * block
