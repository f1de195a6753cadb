"""Modules that hold factors: trained ones, an A that is drawn and stays, a B of which only kept entries exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Shapes: T tokens (over any leading dimensions), k kept entries, O and I rows and columns of a matrix.

NOT_STARTED = float("nan")  # the value of a factor that was neither drawn nor loaded: it makes every output NaN


class DenseFactor(nn.Module):
    """A matrix that trains.

    Args:
        size: Rows and columns, behind the number of stacked matrices, if any.
        device: Where it lives.
        dtype: Its type.
        value: The value of all entries until they are drawn or loaded.
    """

    def __init__(
        self, size: tuple[int, ...], device: torch.device, dtype: torch.dtype, value: float = NOT_STARTED
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(size, value, device=device, dtype=dtype))

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows by the matrix."""
        return functional.linear(x_TI, self.weight)


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
        weight_OI = torch.full((num_rows, num_columns), NOT_STARTED, device=device, dtype=torch.float32)
        self.register_buffer("weight", weight_OI, persistent=stored)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows by the matrix."""
        return functional.linear(x_TI, self.weight)


class SparseFactor(nn.Module):
    """A matrix of which only some entries exist: trained values and where they stand; all others are zero.

    Gradients, optimizer state and checkpoint are those of the values. The dense matrix is made inside a product, and is
    not kept for the backward pass but made again there.

    Args:
        num_rows: Rows.
        num_columns: Columns.
        indices_k: Positions of the kept entries in the matrix laid out row by row, rising, int32, shape (k,).
        device: Where it lives.
    """

    indices: Tensor

    def __init__(self, num_rows: int, num_columns: int, indices_k: Tensor, device: torch.device) -> None:
        super().__init__()
        self.shape = (num_rows, num_columns)
        self.values = nn.Parameter(torch.zeros(len(indices_k), device=device, dtype=torch.float32))
        self.register_buffer("indices", indices_k.to(device=device, dtype=torch.int32))
        self.register_load_state_dict_pre_hook(_keep_loaded_entries)  # type: ignore[no-untyped-call]

    def keep(self, indices_k: Tensor) -> None:
        """Keep other entries, all of them zero.

        Args:
            indices_k: Their positions, rising.
        """
        values = self.values
        if len(values) == len(indices_k) and values.device.type != "meta":
            values.data.zero_()  # the same parameter: an optimizer may know it already
        else:
            fresh_k = torch.zeros(len(indices_k), device=values.device, dtype=values.dtype)
            self.values = nn.Parameter(fresh_k, requires_grad=values.requires_grad)
        self.indices = indices_k.to(device=values.device, dtype=torch.int32)

    @property
    def weight(self) -> Tensor:
        """The dense matrix; its gradient reaches the kept entries alone."""
        dense_OI: Tensor = _Scatter.apply(self.values, self.indices, self.shape)  # type: ignore[no-untyped-call]
        return dense_OI

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows by the matrix."""
        out_TO: Tensor = _SparseLinear.apply(x_TI, self.values, self.indices, self.shape)  # type: ignore[no-untyped-call]
        return out_TO


def _keep_loaded_entries(factor: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Keep the entries of the state that is loaded next."""
    indices_k = state.get(f"{prefix}indices")
    if indices_k is not None and isinstance(factor, SparseFactor):
        factor.keep(indices_k)


def matrix_of(factor: Any) -> Tensor:
    """Return a factor's matrix, whatever holds it."""
    matrix_OI: Tensor = factor if isinstance(factor, Tensor) else factor.weight
    return matrix_OI


def scattered(values_k: Tensor, indices_k: Tensor, shape: tuple[int, int]) -> Tensor:
    """Make the dense matrix of kept values."""
    return values_k.new_zeros(shape[0] * shape[1]).index_copy_(0, indices_k.long(), values_k).view(shape)


class _Scatter(torch.autograd.Function):
    """Values to a matrix, and the matrix's gradient to the values'."""

    @staticmethod
    def forward(ctx: Any, values_k: Tensor, indices_k: Tensor, shape: tuple[int, int]) -> Tensor:
        """Scatter."""
        ctx.save_for_backward(indices_k)
        return scattered(values_k, indices_k, shape)

    @staticmethod
    def backward(ctx: Any, *grads_OI: Tensor) -> tuple[Tensor, None, None]:
        """Gather."""
        (indices_k,) = ctx.saved_tensors
        return grads_OI[0].reshape(-1).index_select(0, indices_k.long()), None, None


class _SparseLinear(torch.autograd.Function):
    """A product with a sparse matrix, whose dense form is made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, values_k: Tensor, indices_k: Tensor, shape: tuple[int, int]) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(x_TI, values_k, indices_k)
        ctx.shape = shape
        with torch.autocast(x_TI.device.type, enabled=False):  # the backward pass has none either
            return functional.linear(x_TI.to(values_k.dtype), scattered(values_k, indices_k, shape))

    @staticmethod
    def backward(ctx: Any, *grads_TO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of the rows and of the kept values."""
        x_TI, values_k, indices_k = ctx.saved_tensors
        grad_TO = grads_TO[0].to(values_k.dtype)
        grad_x_TI = (grad_TO @ scattered(values_k, indices_k, ctx.shape)).to(x_TI.dtype)
        grad_OI = grad_TO.reshape(-1, grad_TO.shape[-1]).t() @ x_TI.reshape(-1, x_TI.shape[-1]).to(values_k.dtype)
        return grad_x_TI, grad_OI.reshape(-1).index_select(0, indices_k.long()), None, None
