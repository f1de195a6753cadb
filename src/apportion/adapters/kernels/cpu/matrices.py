"""The experts' frozen matrices of one parameter: views of a plain one, dequantised one by one from a packed one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from apportion.experts.weights import StackedWeight

# Shapes: E experts, I and O the parameter's input and output width.

MatrixOf = Callable[[int], Tensor]  # from an expert's id


class FrozenMatrices(NamedTuple):
    """One parameter's matrices of all experts, with shape (O, I) in whatever form they are stored.

    Args:
        weight: As they are stored.
        transposed: Whether they are stored as (I, O).
        plain_EOI: All matrices, where none has to be dequantised: this is what the backward pass saves.
    """

    weight: StackedWeight
    transposed: bool
    plain_EOI: Tensor | None

    @classmethod
    def of(cls, weight: StackedWeight, transposed: bool) -> FrozenMatrices:
        """Take matrices as they are stored; nothing is dequantised."""
        if weight.is_packed:
            return cls(weight, transposed, None)
        whole = weight.whole()
        return cls(weight, transposed, whole.transpose(1, 2) if transposed else whole)

    @property
    def width_in(self) -> int:
        """I."""
        return self.weight.shape[1 if self.transposed else 2]

    @property
    def width_out(self) -> int:
        """O."""
        return self.weight.shape[2 if self.transposed else 1]

    def by_expert(self, num_experts: int, *, turned: bool = False) -> MatrixOf:
        """Return the matrices of some experts.

        Args:
            num_experts: How many of them will be taken.
            turned: Whether to give them as (I, O).

        Returns:
            A function from an expert's id to its matrix. A packed one is dequantised by each call, and not kept.
        """
        if self.plain_EOI is None:
            return lambda expert: self._dequantised(expert, turned=turned)
        matrices = self.plain_EOI.transpose(1, 2) if turned else self.plain_EOI
        is_for_most = 2 * num_experts > self.weight.shape[0]
        return matrices.unbind().__getitem__ if is_for_most else matrices.__getitem__

    def _dequantised(self, expert: int, *, turned: bool) -> Tensor:
        """Dequantise one matrix."""
        matrix = self.weight.dense((expert,), self.weight.dtype)[0]
        return matrix.t() if turned != self.transposed else matrix
