"""Any shape of adapter on a linear layer, for what PEFT's own LoRA layers lack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor

from apportion.adapters.hosts.wrapped import WrappedModule
from apportion.adapters.shapes.base import Place
from apportion.adapters.shapes.low_rank import LowRank
from apportion.linear_forms import compute_place

# Shapes: T tokens (over any leading dimensions), I and O input and output width.


class LinearLora(WrappedModule):
    """A linear layer plus the outputs of adapters.

    Args:
        base_layer: A linear layer of any kind with ``in_features`` and ``out_features``.
    """

    def place(self) -> Place:
        """Return the matrix that adapters are made for."""
        device, dtype = compute_place(self.base_layer)
        return Place(self.base_layer.out_features, self.base_layer.in_features, device, dtype)

    def adopt(self, layer: LoraLayer) -> None:
        """Take over the adapters of PEFT's own LoRA layer.

        Args:
            layer: The layer that this one replaces, with the same base layer.
        """
        for name in layer.lora_A:
            self.lora_shape[name] = shape_of(layer, name)
            self.lora_dropout[name] = layer.lora_dropout[name]
        self.merged_adapters = list(layer.merged_adapters)
        self._disable_adapters = layer.disable_adapters

    def run(self, active: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer with the named adapters.

        Args:
            active: Adapters that this layer has.
            *args: As the layer takes them; first the input, shape (..., I).
            **kwargs: As the layer takes them.

        Returns:
            Shape (..., O), in the layer's own type.
        """
        out_TO: Tensor = self.base_layer(*args, **kwargs)
        for adapter in active:
            delta_TO = self.lora_shape[adapter](args[0], self.lora_dropout[adapter])
            out_TO = out_TO + delta_TO.to(out_TO.dtype)
        return out_TO

    def weight_deltas(self, adapter_name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the weight and what an adapter adds to it.

        Args:
            adapter_name: The adapter.

        Yields:
            One pair.

        Raises:
            ValueError: the adapter's gates depend on the input.
        """
        shape = self.lora_shape[adapter_name]
        if shape.is_gated:
            raise ValueError(
                f"adapter {adapter_name!r} has LoRA experts with a gate that depends on the input, so no weight equals "
                "it and it cannot be merged"
            )
        yield self.base_layer.weight, shape.weight_delta()


def shape_of(layer: LoraLayer, adapter_name: str) -> LowRank:
    """Return an adapter of PEFT's own LoRA layer as a shape that shares its factors."""
    return LowRank(layer.lora_A[adapter_name], layer.lora_B[adapter_name], layer.scaling[adapter_name])
