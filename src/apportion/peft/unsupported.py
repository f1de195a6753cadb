"""Refuse planned modules that no adapter works on as their weights are stored, before anything changes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from apportion.compat.accelerate import offloading_device
from apportion.compat.peft import has_lora_layer
from apportion.compat.transformers import is_expert_parallel
from apportion.errors import ConfigurationError
from apportion.linear_forms import PLAIN_TYPES, is_quantised
from apportion.records.site import Storage

Kinds = set[tuple[type, type]]


def refuse_unsupported(path: str, module: nn.Module, storage: Storage, known: Kinds) -> None:
    """Raise an error if no adapter works on a module's weight.

    Args:
        path: The module's path.
        module: The base module.
        storage: How its site is stored: a linear layer gets PEFT's LoRA layer; of other modules the weight is read.
        known: Classes of layers and weights that PEFT has a LoRA layer for; those found are added.

    Raises:
        ConfigurationError: PEFT has no LoRA layer for the class, or the weight cannot be read.

    Cost: one LoRA layer of rank 1 is built per class of quantised layers, and dropped.
    """
    weight = getattr(module, "weight", None)
    if storage == "weight" and (type(weight) is not nn.Parameter or weight.dtype not in PLAIN_TYPES):
        raise _refusal(path, module, weight, "its adapter needs a plain floating-point weight")
    kind = (type(module), type(weight))
    is_plain = type(weight) is nn.Parameter and not is_quantised(module)
    if storage != "linear" or is_plain or kind in known:
        return
    if not has_lora_layer(module):
        raise _refusal(path, module, weight, "PEFT has no LoRA layer for it")
    known.add(kind)


def refuse_elsewhere(path: str, module: nn.Module) -> None:
    """Raise an error if a module's weights are split over processes or not in memory.

    Args:
        path: The module's path.
        module: The base module.

    Raises:
        ConfigurationError: they are.
    """
    reason = None
    if is_expert_parallel(module):
        reason = "are split over processes (expert parallelism)"
    elif any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        reason = "are sharded over processes"
    elif offloading_device(module) is not None:
        reason = "are offloaded and not in memory"
    if reason:
        raise ConfigurationError(
            f"no adapter can be attached to a model whose weights {reason}: its factors would not train correctly.",
            place=path,
            fix="attach the adapters before sharding or offloading the model",
        )


def _refusal(path: str, module: nn.Module, weight: Any, reason: str) -> ConfigurationError:
    """Return the error for a module that cannot be adapted."""
    stored = "" if weight is None else f", its weight a {type(weight).__name__} of {weight.dtype}"
    return ConfigurationError(
        f"a quantised layer cannot be adapted: {reason}.",
        place=path,
        found=f"{type(module).__name__}{stored}",
        fix="load the model without quantisation or with another quantiser, or leave these layers out of the plan",
    )
