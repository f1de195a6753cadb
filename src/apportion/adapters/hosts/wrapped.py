"""What all hosts share: a wrapped module, adapters by name, and merging them into its weights and out again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from apportion.adapters.merging import obstacle
from apportion.adapters.mixed import assemble_rows, rows_by_name, select_rows
from apportion.adapters.shapes.base import Adapter
from apportion.errors import ConfigurationError


class WrappedModule(nn.Module, BaseTunerLayer):
    """A module with adapters; it answers for the wrapped one's attributes.

    Args:
        base_layer: The module that is adapted.
    """

    adapter_layer_names: tuple[str, ...] = ("lora_shape",)
    other_param_names: tuple[str, ...] = ("lora_dropout",)
    base_layer: Any
    lora_shape: Any
    lora_dropout: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_shape = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """Return the wrapped module's attribute where this module has none."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def add_adapter(self, adapter_name: str, shape: Adapter, dropout: float = 0.0) -> None:
        """Add an adapter under a new name.

        Args:
            adapter_name: The adapter's name.
            shape: Its tensors, made for the matrices of this module.
            dropout: Share of the adapter's inputs that is dropped in training. Routers of LoRA experts have none.
        """
        self.lora_shape[adapter_name] = shape
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()

    def adapters_to_run(self) -> list[str]:
        """Name the adapters that the forward pass adds: none where they are disabled or merged.

        Returns:
            Active adapters that this module has. Disabling takes merged ones out of the weights first.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [] if self.merged else [name for name in self.active_adapters if name in self.lora_shape]

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the module, with the active adapters, or with one adapter per row of the batch.

        Args:
            *args: As the wrapped module takes them.
            adapter_names: One name per row of the batch, ``__base__`` for no adapter; the module's inputs hold the
                rows' tokens one row after the other.
            **kwargs: As the wrapped module takes them.

        Returns:
            What the wrapped module returns.
        """
        if adapter_names is None:
            return self.run(self.adapters_to_run(), *args, **kwargs)
        if self.disable_adapters:
            return self.run([], *args, **kwargs)
        if self.merged:
            raise ConfigurationError(
                "rows cannot use different adapters while adapters are merged.", fix="call unmerge_adapter first"
            )
        return self._run_mixed(adapter_names, args, kwargs)

    @abstractmethod
    def run(self, active: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Run the module with the named adapters.

        Args:
            active: Adapters that this module has; none to run the wrapped module alone.
            *args: As the wrapped module takes them.
            **kwargs: As the wrapped module takes them.

        Returns:
            What the wrapped module returns.
        """

    def _run_mixed(self, adapter_names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run each adapter on the rows that name it, and put the outputs back in the rows' order."""
        parts = []
        for name, rows in rows_by_name(adapter_names):
            active = [name] if name in self.lora_shape else []
            selected = [select_rows(value, rows, len(adapter_names)) for value in args]
            selected_kwargs = {key: select_rows(value, rows, len(adapter_names)) for key, value in kwargs.items()}
            parts.append((rows, self.run(active, *selected, **selected_kwargs)))
        return assemble_rows(parts)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weights.

        Args:
            safe_merge: Leave the weights as they are where an adapter is not finite.
            adapter_names: The adapters; the active ones where not given.

        Raises:
            ValueError: `safe_merge`, and an adapter holds NaN or infinity; or the base weights cannot be added to.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_shape:
                continue
            for parameter in self.merged_parameters():
                if reason := obstacle(self.base_layer, parameter):
                    raise ValueError(f"{adapter!r} cannot be merged: {parameter} {reason}.")
            if safe_merge and not self.is_finite(adapter):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            self.add_to_weights(adapter, 1.0)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take merged adapters out of the base weights again."""
        while self.merged_adapters:
            self.add_to_weights(self.merged_adapters.pop(), -1.0)

    def merged_parameters(self) -> tuple[str, ...]:
        """Name the base layer's parameters that merging adds to, by their paths in it."""
        return ("weight",)

    def is_finite(self, adapter_name: str) -> bool:
        """Return whether all that an adapter would add to the weights is finite."""
        return all(bool(torch.isfinite(delta).all()) for _, delta in self.weight_deltas(adapter_name))

    @torch.no_grad()
    def add_to_weights(self, adapter_name: str, sign: float) -> None:
        """Add an adapter's deltas, times the sign, to the base weights."""
        for weight_OI, delta_OI in self.weight_deltas(adapter_name):
            weight_OI.data += sign * delta_OI.to(weight_OI.dtype)

    @abstractmethod
    def weight_deltas(self, adapter_name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the adapted weights and what an adapter adds to them.

        Args:
            adapter_name: The adapter.

        Yields:
            A weight, or a view of it, and the addend, both of shape (O, I).

        Raises:
            ValueError: the adapter's gates depend on the input.
        """
