"""Batches whose rows use different adapters: cut a module's inputs by row, and put its outputs together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Shapes: N rows of the batch that use one adapter.


def rows_by_name(adapter_names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Go through the adapters of a batch's rows.

    Args:
        adapter_names: One name per row.

    Yields:
        Each name once, with the rows that have it: int64, in rising order.
    """
    for name in dict.fromkeys(adapter_names):
        yield name, torch.tensor([row for row, other in enumerate(adapter_names) if other == name])


def select_rows(value: Any, rows_N: Tensor, num_rows: int) -> Any:
    """Take some rows' entries of a tensor that holds all rows' entries, one row after the other.

    Args:
        value: The tensor; anything else is returned as it is.
        rows_N: The rows to take.
        num_rows: Rows of the batch.

    Returns:
        Their entries.

    Raises:
        ValueError: the tensor's length is no multiple of the number of rows.
    """
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if len(value) % num_rows:
        raise ValueError(f"{len(value)} entries cannot be divided among {num_rows} rows with adapters of their own.")
    by_row = value.reshape(num_rows, -1, *value.shape[1:])
    return by_row.index_select(0, rows_N.to(value.device)).flatten(0, 1)


def assemble_rows(parts: Sequence[tuple[Tensor, Any]]) -> Any:
    """Put the outputs of some rows each together into those of the whole batch.

    Args:
        parts: Rows, and the output that belongs to them: a tensor, or a tuple of tensors.

    Returns:
        The outputs in the order of the batch's rows.
    """
    first = parts[0][1]
    if isinstance(first, tuple):
        columns = [[(rows_N, output[place]) for rows_N, output in parts] for place in range(len(first))]
        return tuple(assemble_rows(column) for column in columns)
    if not isinstance(first, Tensor):
        return first
    order = torch.cat([rows_N for rows_N, _ in parts]).argsort().to(first.device)
    by_row = torch.cat([output.reshape(len(rows_N), -1, *output.shape[1:]) for rows_N, output in parts])
    return by_row.index_select(0, order).flatten(0, 1)
