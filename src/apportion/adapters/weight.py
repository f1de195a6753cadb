"""LoRA on a module of any class that holds one two-dimensional ``weight``: the routers of transformers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from apportion.adapters.factors import FrozenFactor, SparseFactor
from apportion.adapters.wrapped import WrappedModule


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

    def add_adapter(
        self,
        adapter_name: str,
        rank: int,
        scale: float,
        *,
        frozen_a: bool = False,
        stored_a: bool = False,
        indices: Tensor | None = None,
    ) -> None:
        """Add zero-initialised factors under a new name.

        Args:
            adapter_name: The adapter's name.
            rank: Rank of the factors.
            scale: alpha / rank.
            frozen_a: Whether A stays as it is drawn.
            stored_a: Whether checkpoints hold a frozen A.
            indices: Where B is sparse, its kept entries, laid out row by row (out, rank).
        """
        weight = self.base_layer.weight
        out_features, in_features = weight.shape
        kwargs: dict[str, Any] = {"bias": False, "device": weight.device, "dtype": weight.dtype}
        self.lora_A[adapter_name] = nn.Linear(in_features, rank, **kwargs)
        self.lora_B[adapter_name] = nn.Linear(rank, out_features, **kwargs)
        nn.init.kaiming_uniform_(self.lora_A[adapter_name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[adapter_name].weight)
        if frozen_a:
            self.lora_A[adapter_name] = FrozenFactor(rank, in_features, weight.device, stored=stored_a)
        if indices is not None:
            self.lora_B[adapter_name] = SparseFactor(out_features, rank, indices, weight.device)
        self.scaling[adapter_name] = scale

    def delta(self, adapter_name: str) -> Tensor:
        """Give what an adapter adds to the weight.

        Args:
            adapter_name: The adapter.

        Returns:
            Shape (out, in), in the factors' type.
        """
        a, b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        delta: Tensor = (b @ a) * self.scaling[adapter_name]
        return delta

    def run(self, active: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Run the module with the named adapters.

        Args:
            active: Adapters that this module has.
            *args: As the module takes them.
            **kwargs: As the module takes them.

        Returns:
            What the module returns.
        """
        if not active:
            return self.base_layer(*args, **kwargs)
        weight = self.base_layer.weight
        for adapter in active:
            weight = weight + self.delta(adapter).to(weight.dtype)
        return _twin_with_weight(self.base_layer, weight)(*args, **kwargs)

    def is_finite(self, adapter_name: str) -> bool:
        """Tell whether all that an adapter would add to the weight is finite."""
        return bool(torch.isfinite(self.delta(adapter_name)).all())

    @torch.no_grad()
    def add_to_weights(self, adapter_name: str, sign: float) -> None:
        """Add an adapter's delta, times the sign, to the weight."""
        weight = self.base_layer.weight
        weight.data += sign * self.delta(adapter_name).to(weight.dtype)


def _twin_with_weight(base: Any, weight: Tensor) -> Any:
    """Make a copy of a module that shares everything with it but its weight; the module itself stays as it is.

    Other threads may run the module meanwhile. `torch.func.functional_call` would swap the weight in place.
    """
    twin = object.__new__(type(base))
    own = vars(twin)
    own.update(vars(base))
    own["_parameters"] = {**base._parameters, "weight": weight}
    own["_compiled_call_impl"] = None  # compiled for the module's own weight
    own.pop("weight", None)  # FSDP1 keeps its view of the weight here
    forward = own.get("forward")
    if isinstance(forward, functools.partial) and "_old_forward" in own:  # accelerate's hooks are bound to the module
        own["_old_forward"] = MethodType(base._old_forward.__func__, twin)
        own["forward"] = functools.partial(forward.func, twin)
    elif isinstance(forward, MethodType):
        own["forward"] = MethodType(forward.__func__, twin)
    elif forward is not None:
        raise TypeError(f"{type(base).__name__} was given a forward of its own, which an adapter cannot run through.")
    return twin
