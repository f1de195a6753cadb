"""Adapters on a module of any class that holds one two-dimensional ``weight``: the routers of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from apportion.adapters.hosts.wrapped import WrappedModule
from apportion.adapters.shapes.base import Place
from apportion.compat.accelerate import hook_of
from apportion.compat.torch import copy_with_weight

# Shapes: O and I output and input width of the weight.


class WeightLora(WrappedModule):
    """A module run with its weight plus those of its adapters in place of its weight.

    A router is small (experts x model width), so the sum costs nothing beside the experts, and whatever the module does
    with its weight (softmax, sigmoid, groups, a correction bias) is left to the module. Dropout does not apply here.

    Args:
        base_layer: A module with a ``weight`` of shape (out, in).
    """

    def place(self) -> Place:
        """Return the matrix that adapters are made for."""
        weight = self.base_layer.weight
        width_out, width_in = weight.shape
        return Place(width_out, width_in, weight.device, weight.dtype)

    def run(self, active: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Run the module with the named adapters.

        Args:
            active: Adapters that this module has.
            *args: As the module takes them.
            **kwargs: As the module takes them.

        Returns:
            What the module returns.
        """
        base = self.base_layer
        if not active:
            return base(*args, **kwargs)
        hook = hook_of(base)  # accelerate's, which may fetch the weight for the call alone
        if hook is not None:
            args, kwargs = hook.pre_forward(base, *args, **kwargs)
        weight_OI = base.weight
        for adapter in active:
            weight_OI = weight_OI + self.lora_shape[adapter].weight_delta().to(weight_OI.dtype)
        output = copy_with_weight(base, weight_OI)(*args, **kwargs)
        return output if hook is None else hook.post_forward(base, output)

    def weight_deltas(self, adapter_name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the weight and what an adapter adds to it."""
        yield self.base_layer.weight, self.lora_shape[adapter_name].weight_delta()
