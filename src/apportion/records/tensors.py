"""Tensors stored as NumPy arrays, so that PyTorch is imported only when a tensor is accessed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from apportion.records.arrays import Array, as_array

if TYPE_CHECKING:
    from torch import Tensor


class Tensors(Mapping[str, "Tensor"]):
    """A mapping of tensors, stored as NumPy arrays.

    Args:
        values: Tensors or arrays by name. Only tensors outside CPU memory are copied.
    """

    def __init__(self, values: Mapping[str, Tensor | Array]) -> None:
        self.arrays = arrays_of(values)

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor that shares the array's memory."""
        return as_tensor(self.arrays[name])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.arrays)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.arrays)

    def __repr__(self) -> str:
        """Show the arrays."""
        return f"{type(self).__name__}({self.arrays!r})"


def arrays_of(values: Mapping[str, Tensor | Array] | Mapping[str, Tensor]) -> dict[str, Array]:
    """Convert tensors to NumPy arrays.

    Args:
        values: Tensors or arrays by name.

    Returns:
        Arrays by name. They share memory with CPU tensors.
    """
    if isinstance(values, Tensors):
        return values.arrays
    return {name: as_array(value) for name, value in values.items()}


def as_tensor(array: Array) -> Tensor:
    """Convert an array to a tensor of the same dtype.

    Args:
        array: The array.

    Returns:
        A tensor that shares the array's memory.
    """
    import torch  # not at module level: reading records must not import PyTorch

    tensor = torch.from_numpy(array)
    return tensor if tensor.numel() else tensor.new_empty(tensor.shape)  # NumPy's strides of nothing are zero
