"""Arrays as tensors, where a public name promises tensors: reading a file takes no PyTorch until they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from apportion.records.arrays import Array, as_array

if TYPE_CHECKING:
    from torch import Tensor


class Tensors(Mapping[str, "Tensor"]):
    """Tensors by name, held as NumPy arrays.

    Args:
        values: Tensors or arrays by name. Each is copied only if it is not in the CPU's memory.
    """

    def __init__(self, values: Mapping[str, Tensor | Array]) -> None:
        self.arrays = arrays_of(values)

    def __getitem__(self, name: str) -> Tensor:
        """Give one as a tensor that shares the array's memory."""
        return as_tensor(self.arrays[name])

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self.arrays)

    def __len__(self) -> int:
        """Count them."""
        return len(self.arrays)

    def __repr__(self) -> str:
        """Show the arrays."""
        return f"{type(self).__name__}({self.arrays!r})"


def arrays_of(values: Mapping[str, Tensor | Array] | Mapping[str, Tensor]) -> dict[str, Array]:
    """Give tensors as the arrays that they are held as.

    Args:
        values: Tensors or arrays by name.

    Returns:
        Arrays by name; they share the memory of tensors on the CPU.
    """
    if isinstance(values, Tensors):
        return values.arrays
    return {name: as_array(value) for name, value in values.items()}


def as_tensor(array: Array) -> Tensor:
    """Give an array as a tensor of the same type.

    Args:
        array: The array.

    Returns:
        A tensor that shares its memory.
    """
    import torch  # records are read without PyTorch

    tensor = torch.from_numpy(array)
    return tensor if tensor.numel() else tensor.new_empty(tensor.shape)  # NumPy's strides of nothing are zero
