"""LoRA on a module of any class that holds one two-dimensional ``weight``: the routers of transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call


class WeightLora(nn.Module, BaseTunerLayer):
    """A module run with ``weight + scale · B A`` in place of its weight.

    A router is small (experts x model width), so the sum costs nothing beside the experts, and whatever the module does
    with its weight (softmax, sigmoid, groups, a correction bias) stays its own affair. Dropout does not apply here.

    Args:
        base_layer: A module with a ``weight`` of shape (out, in).
    """

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("scaling",)
    base_layer: Any
    lora_A: Any
    lora_B: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """Give the wrapped module's attribute where this module has none."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def add_adapter(self, adapter_name: str, rank: int, scale: float) -> None:
        """Add zero-initialised factors under a new name.

        Args:
            adapter_name: The adapter's name.
            rank: Rank of the factors.
            scale: alpha / rank.
        """
        weight = self.base_layer.weight
        out_features, in_features = weight.shape
        kwargs: dict[str, Any] = {"bias": False, "device": weight.device, "dtype": weight.dtype}
        self.lora_A[adapter_name] = nn.Linear(in_features, rank, **kwargs)
        self.lora_B[adapter_name] = nn.Linear(rank, out_features, **kwargs)
        nn.init.kaiming_uniform_(self.lora_A[adapter_name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[adapter_name].weight)
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
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(*args, **kwargs)
        weight = self.base_layer.weight
        for adapter in active:
            weight = weight + self.delta(adapter).to(weight.dtype)
        return functional_call(self.base_layer, {"weight": weight}, args, kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight.

        Args:
            safe_merge: Leave the weight as it is where an adapter is not finite.
            adapter_names: The adapters; the active ones where not given.

        Raises:
            ValueError: `safe_merge`, and an adapter holds NaN or infinity.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_A:
                continue
            if safe_merge and not bool(torch.isfinite(self.delta(adapter)).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            self._add_to_weight(adapter, 1.0)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take merged adapters out of the base weight again."""
        while self.merged_adapters:
            self._add_to_weight(self.merged_adapters.pop(), -1.0)

    @torch.no_grad()
    def _add_to_weight(self, adapter: str, sign: float) -> None:
        """Add an adapter's delta, times the sign, to the weight."""
        weight = self.base_layer.weight
        weight.data += sign * self.delta(adapter).to(weight.dtype)
