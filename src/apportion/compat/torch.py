"""The state of `torch.nn.Module` below its attributes, and an operator that PyTorch offers to its compiler alone.

Checked on: torch 2.13.
When it breaks: `torch.nn.Module.__init__` and ``__getattr__`` show where modules keep parameters and buffers. The
operator's schema is in ``aten/src/ATen/native/mkldnn/Linear.cpp``; without it products run through MKL.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from apportion.compat.accelerate import forward_attribute

_linear_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
HAS_ONEDNN_PRODUCT = _linear_pointwise is not None


def stored_parameters(module: nn.Module) -> dict[str, Any]:
    """Return the parameters that a module itself holds, without computing parametrised ones.

    Args:
        module: Any module.

    Returns:
        Parameters by name.
    """
    stored: dict[str, Any] = vars(module)["_parameters"]
    return stored


def stored_buffers(module: nn.Module) -> dict[str, Any]:
    """Return the buffers that a module itself holds.

    Args:
        module: Any module.

    Returns:
        Buffers by name.
    """
    stored: dict[str, Any] = vars(module)["_buffers"]
    return stored


def parametrisations(module: nn.Module) -> Any:
    """Return how a module's parametrised parameters are computed, by name. No parameter is computed."""
    return vars(module)["_modules"].get("parametrizations") or {}


def copy_with_weight(module: Any, weight_OI: Tensor) -> Any:
    """Make a copy of a module that shares everything with it but its weight. The module itself does not change.

    Other threads may run the module meanwhile. `torch.func.functional_call` would swap the weight in place.

    Args:
        module: A module with a ``weight``.
        weight_OI: The copy's weight.

    Returns:
        The copy.

    Raises:
        TypeError: the module was given a forward of its own, as a function that is bound to no module.
    """
    copied = object.__new__(type(module))
    attributes = vars(copied)
    attributes.update(vars(module))
    attributes["_parameters"] = {**stored_parameters(module), "weight": weight_OI}
    attributes["_compiled_call_impl"] = None  # compiled for the module's own weight
    attributes.pop("weight", None)  # FSDP1 keeps its view of the weight here
    own = attributes.get("forward")
    if (wrapped := forward_attribute(module)) != "forward":
        own = attributes.pop(wrapped)
    if isinstance(own, MethodType):
        attributes["forward"] = MethodType(own.__func__, copied)
    elif own is not None:
        raise TypeError(f"{type(module).__name__} was given a forward of its own, which an adapter cannot run through.")
    return copied


def onednn_product(rows_NI: Tensor, matrix_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Multiply float32 rows by a matrix in oneDNN, if `HAS_ONEDNN_PRODUCT`.

    Args:
        rows_NI: The rows.
        matrix_OI: The matrix.
        bias_O: What is added to each row.

    Returns:
        Shape (N, O).
    """
    product_NO: Tensor = _linear_pointwise(rows_NI, matrix_OI, bias_O, "none", [], "")
    return product_NO
