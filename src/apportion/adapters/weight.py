"""LoRA on a module of any class that holds one two-dimensional ``weight``: the routers of transformers."""

from __future__ import annotations

import math
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, with the active adapters.

        Args:
            *args: As the module takes them.
            **kwargs: As the module takes them.

        Returns:
            What the module returns.
        """
        active = self.adapters_to_run()
        if not active:
            return self.base_layer(*args, **kwargs)
        weight = self.base_layer.weight
        for adapter in active:
            weight = weight + self.delta(adapter).to(weight.dtype)
        parameters = self.base_layer._parameters  # functional_call does the same; decoding feels its overhead
        own, parameters["weight"] = parameters["weight"], weight
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            parameters["weight"] = own

    def is_finite(self, adapter_name: str) -> bool:
        """Tell whether all that an adapter would add to the weight is finite."""
        return bool(torch.isfinite(self.delta(adapter_name)).all())

    @torch.no_grad()
    def add_to_weights(self, adapter_name: str, sign: float) -> None:
        """Add an adapter's delta, times the sign, to the weight."""
        weight = self.base_layer.weight
        weight.data += sign * self.delta(adapter_name).to(weight.dtype)
