"""Iterate over an adapter's modules, whatever hosts them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from apportion.adapters.hosts.linear import shape_of
from apportion.adapters.hosts.wrapped import WrappedModule
from apportion.adapters.shapes.base import Adapter
from apportion.discovery import walk_modules


def adapters_of(module: nn.Module) -> set[str]:
    """Return the names of the adapters that a module has; PEFT's own LoRA layers count too."""
    layer: Any = module
    if isinstance(layer, WrappedModule):
        return set(layer.lora_shape)
    return set(layer.lora_A) if isinstance(layer, LoraLayer) else set()


def hosted(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Adapter]]:
    """Iterate over an adapter's modules.

    Args:
        model: The model with the adapter.
        adapter_name: The adapter.

    Yields:
        The host's path in the plain model, and the module. For PEFT's own LoRA layers, it shares their factors.
    """
    for path, called, _ in walk_modules(model):
        layer: Any = called
        if adapter_name in adapters_of(layer):
            is_peft = isinstance(layer, LoraLayer)
            yield path, shape_of(layer, adapter_name) if is_peft else layer.lora_shape[adapter_name]
