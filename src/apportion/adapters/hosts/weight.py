"""LoRA on a module of any class that holds one two-dimensional ``weight``: the routers of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apportion.adapters.factors import factor_pair
from apportion.adapters.hosts.wrapped import WrappedModule
from apportion.adapters.specs import DEFAULT_OPTIONS, FactorOptions, FactorSpec
from apportion.compat.accelerate import hook_of
from apportion.compat.torch import copy_with_weight

# Shapes: O and I output and input width of the weight, R rank.


class WeightLora(WrappedModule):
    """A module run with ``weight + scale · B A`` in place of its weight.

    A router is small (experts x model width), so the sum costs nothing beside the experts, and whatever the module does
    with its weight (softmax, sigmoid, groups, a correction bias) stays its own affair. Dropout does not apply here.

    Args:
        base_layer: A module with a ``weight`` of shape (out, in).
    """

    other_param_names = ("scaling",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.scaling: dict[str, float] = {}

    def add_adapter(self, adapter_name: str, spec: FactorSpec, options: FactorOptions = DEFAULT_OPTIONS) -> None:
        """Add zero-initialised factors under a new name.

        Args:
            adapter_name: The adapter's name.
            spec: What is planned for the weight, without LoRA experts.
            options: Whether A is frozen and stored.
        """
        weight = self.base_layer.weight
        a, b = factor_pair(spec, options, tuple(weight.shape), weight.device, weight.dtype)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = a, b
        self.scaling[adapter_name] = spec.scale

    def delta(self, adapter_name: str) -> Tensor:
        """Return what an adapter adds to the weight.

        Args:
            adapter_name: The adapter.

        Returns:
            Shape (out, in), in the factors' type.
        """
        a_RI, b_OR = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        delta_OI: Tensor = (b_OR @ a_RI) * self.scaling[adapter_name]
        return delta_OI

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
            weight_OI = weight_OI + self.delta(adapter).to(weight_OI.dtype)
        output = copy_with_weight(base, weight_OI)(*args, **kwargs)
        return output if hook is None else hook.post_forward(base, output)

    def is_finite(self, adapter_name: str) -> bool:
        """Tell whether all that an adapter would add to the weight is finite."""
        return bool(torch.isfinite(self.delta(adapter_name)).all())

    @torch.no_grad()
    def add_to_weights(self, adapter_name: str, sign: float) -> None:
        """Add an adapter's delta, times the sign, to the weight."""
        weight = self.base_layer.weight
        weight.data += sign * self.delta(adapter_name).to(weight.dtype)
