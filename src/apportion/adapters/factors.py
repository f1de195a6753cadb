"""Factors: those of several experts, an A that is drawn and stays, a B of which only kept entries exist."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from apportion.adapters.constants import constant

# Shapes: k kept entries of a matrix; H planned experts, R their summed rank.


@dataclass(frozen=True)
class ExpertFactors:
    """What one adapter plans for one projection of a layer's experts.

    Args:
        experts: Ids of the planned experts, in rising order.
        ranks: Rank of each.
        scales: alpha / rank of each.
        indices: Where the factors are sparse, the kept entries of each expert's B, laid out row by row (out, rank).
    """

    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    indices: tuple[Tensor, ...] | None = None

    def scale(self, like: Tensor) -> Tensor | float:
        """Give each of the R rows its expert's scale, shape (R, 1), or the one number that all have."""
        if len(set(self.scales)) == 1:
            return self.scales[0]
        pairs = zip(self.ranks, self.scales, strict=True)
        rows = tuple(scale for rank, scale in pairs for _ in range(rank))
        return constant(rows, like.device).to(like.dtype).unsqueeze(1)

    def by_expert(self, stacked: Tensor) -> dict[int, Tensor]:
        """Cut a tensor of R rows into the experts' own, as views."""
        return dict(zip(self.experts, torch.split_with_sizes(stacked, self.ranks), strict=True))

    @cached_property
    def places(self) -> dict[int, tuple[slice, float]]:
        """The rows of each expert among the R, and its scale."""
        ends = itertools.accumulate(self.ranks)
        columns = zip(self.experts, self.ranks, ends, self.scales, strict=True)
        return {expert: (slice(end - rank, end), scale) for expert, rank, end, scale in columns}

    def padded(self, stacked: Tensor, block: int = 1) -> Tensor:
        """Give the planned experts as many rows each of a stacked factor, with zeros where an expert has fewer.

        Args:
            stacked: Shape (R, width).
            block: What the number of rows is a multiple of.

        Returns:
            Shape (H, rows, width).
        """
        rows = -(-max(self.ranks) // block) * block
        shape = (len(self.ranks), rows, stacked.shape[1])
        if set(self.ranks) == {rows}:
            return stacked.view(shape)
        padded = stacked.new_zeros(shape[0] * rows, shape[2])
        return padded.index_copy(0, self._places(rows, stacked.device), stacked).view(shape)

    def unpadded(self, padded: Tensor) -> Tensor:
        """Take the experts' own rows out of what `padded` gives.

        Args:
            padded: Shape (H, rows, width).

        Returns:
            Shape (R, width).
        """
        _, rows, width = padded.shape
        stacked = padded.view(-1, width)
        return stacked if set(self.ranks) == {rows} else stacked.index_select(0, self._places(rows, padded.device))

    def _places(self, rows: int, device: torch.device) -> Tensor:
        """Tell where the R rows are, where every expert has as many."""
        return constant(
            tuple(number * rows + row for number, rank in enumerate(self.ranks) for row in range(rank)), device
        )

    def stacked_indices(self, width_out: int) -> Tensor:
        """Give the kept entries' positions in the stacked factor of shape (R, O).

        Args:
            width_out: The projection's output width O.

        Returns:
            int64, expert after expert, each expert's in the order of `indices`.
        """
        starts = [sum(self.ranks[:number]) for number in range(len(self.ranks))]
        own = [indices.long() for indices in self.indices or ()]
        parts = [
            (start + i % rank) * width_out + i // rank for start, rank, i in zip(starts, self.ranks, own, strict=True)
        ]
        return torch.cat(parts)


class FrozenFactor(nn.Module):
    """A matrix that never trains, drawn anew from its seed wherever it is needed.

    It is a buffer, so no optimizer and no trainer can move it, and by default it is in no checkpoint.

    Args:
        num_rows: Rows.
        num_columns: Columns.
        device: Where it lives.
        stored: Whether checkpoints hold it.
    """

    weight: Tensor

    def __init__(self, num_rows: int, num_columns: int, device: torch.device, *, stored: bool = False) -> None:
        super().__init__()
        weight = torch.zeros(num_rows, num_columns, device=device, dtype=torch.float32)
        self.register_buffer("weight", weight, persistent=stored)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply rows by the matrix."""
        return functional.linear(x, self.weight)


class SparseFactor(nn.Module):
    """A matrix of which only some entries exist: trained values and where they stand; all others are zero.

    Gradients, optimizer state and checkpoint are those of the values. The dense matrix is made inside a product, and is
    not kept for the backward pass but made again there.

    Args:
        num_rows: Rows.
        num_columns: Columns.
        indices: Positions of the kept entries in the matrix laid out row by row, rising, int32, shape (k,).
        device: Where it lives.
    """

    indices: Tensor

    def __init__(self, num_rows: int, num_columns: int, indices: Tensor, device: torch.device) -> None:
        super().__init__()
        self.shape = (num_rows, num_columns)
        self.values = nn.Parameter(torch.zeros(len(indices), device=device, dtype=torch.float32))
        self.register_buffer("indices", indices.to(device=device, dtype=torch.int32))

    def keep(self, indices: Tensor) -> None:
        """Keep other entries, all of them zero.

        Args:
            indices: Their positions, rising.
        """
        values = self.values
        if len(values) == len(indices) and values.device.type != "meta":
            values.data.zero_()  # the same parameter: an optimizer may know it already
        else:
            fresh = torch.zeros(len(indices), device=values.device, dtype=values.dtype)
            self.values = nn.Parameter(fresh, requires_grad=values.requires_grad)
        self.indices = indices.to(device=values.device, dtype=torch.int32)

    @property
    def weight(self) -> Tensor:
        """The dense matrix; its gradient reaches the kept entries alone."""
        dense: Tensor = _Scatter.apply(self.values, self.indices, self.shape)  # type: ignore[no-untyped-call]
        return dense

    def forward(self, x: Tensor) -> Tensor:
        """Multiply rows by the matrix."""
        out: Tensor = _SparseLinear.apply(x, self.values, self.indices, self.shape)  # type: ignore[no-untyped-call]
        return out


def matrix_of(factor: Any) -> Tensor:
    """Give a factor's matrix, whatever holds it."""
    matrix: Tensor = factor if isinstance(factor, Tensor) else factor.weight
    return matrix


def scattered(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """Make the dense matrix of kept values."""
    return values.new_zeros(shape[0] * shape[1]).index_copy_(0, indices.long(), values).view(shape)


class _Scatter(torch.autograd.Function):
    """Values to a matrix, and the matrix's gradient to the values'."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
        """Scatter."""
        ctx.save_for_backward(indices)
        return scattered(values, indices, shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Gather."""
        (indices,) = ctx.saved_tensors
        return grads[0].reshape(-1).index_select(0, indices.long()), None, None


class _SparseLinear(torch.autograd.Function):
    """A product with a sparse matrix, whose dense form is made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(x, values, indices)
        ctx.shape = shape
        with torch.autocast(x.device.type, enabled=False):  # the backward pass has none either
            return functional.linear(x.to(values.dtype), scattered(values, indices, shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Give the gradients of the rows and of the kept values."""
        x, values, indices = ctx.saved_tensors
        grad = grads[0].to(values.dtype)
        grad_x = (grad @ scattered(values, indices, ctx.shape)).to(x.dtype)
        grad_dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1]).to(values.dtype)
        return grad_x, grad_dense.reshape(-1).index_select(0, indices.long()), None, None
