"""Forms of weight matrices in models: linear layers, and the layers that quantisers replace them with.

A quantised layer stores its weight packed, under any name and in any shape. It still computes a product with one matrix
of ``out_features`` by ``in_features``. This is its logical shape, which sites and fingerprints use.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

PLAIN_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LogicalParameter(NamedTuple):
    """A parameter before quantisation: its path, its shape, and an identity that tied parameters share."""

    name: str
    shape: tuple[int, ...]
    identity: int | tuple[int, str]


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, including quantised ones of any class."""
    return isinstance(module, nn.Linear) or is_quantised(module)


def is_quantised(module: Any) -> bool:
    """Return whether a module is a linear layer whose weight is not stored as a plain matrix.

    Args:
        module: Any module.

    Returns:
        True if the module has integer ``in_features`` and ``out_features``, has no plain weight of that shape, and is
        neither defined by the model's code, nor parametrised, nor a wrapper around another linear layer.
    """
    widths = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if not all(type(width) is int for width in widths):
        return False
    if _is_of_model_code(module) or parametrize.is_parametrized(module):
        return False
    parameters = dict(module.named_parameters(recurse=False))
    weight = module.weight if isinstance(module, nn.Linear) and hasattr(module, "weight") else parameters.get("weight")
    if isinstance(weight, Tensor) and weight.dtype in PLAIN_TYPES and tuple(weight.shape) == widths:
        return False
    return not any(isinstance(inner, nn.Linear) for inner in module.modules() if inner is not module)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a linear layer's class computes something else: a router, or a block-diagonal product."""
    if is_quantised(module):
        return "Grouped" in type(module).__name__
    return "modeling_" in type(module).__module__ and type(module).forward is not nn.Linear.forward


def matrix_shape(module: Any) -> tuple[int, int] | None:
    """Return the logical shape of a module's weight matrix.

    Args:
        module: Any module.

    Returns:
        Output and input width; None if the module has no two-dimensional ``weight``.
    """
    if is_quantised(module):
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.ndim == 2:
        width_out, width_in = weight.shape
        return int(width_out), int(width_in)
    return None


def compute_place(module: Any) -> tuple[torch.device, torch.dtype]:
    """Return where a linear layer computes, and the type for factors beside it.

    Args:
        module: A linear layer, quantised or not.

    Returns:
        The device of its numbers; the type of its weight, or PyTorch's default where that is quantised.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in PLAIN_TYPES:
        return weight.device, weight.dtype
    stored = next(itertools.chain(module.parameters(), module.buffers()))
    return stored.device, torch.get_default_dtype()


def logical_parameters(modules: Mapping[str, Any]) -> Iterator[LogicalParameter]:
    """Iterate over a model's parameters as they would be without quantisation.

    For a quantised layer these are the weight and the bias, if any; scales and other helper tensors are skipped.

    Args:
        modules: All modules by path, parents first.

    Yields:
        The parameters. Tied ones are yielded at each occurrence.
    """
    inside = ""
    for path, module in modules.items():
        if inside and path.startswith(inside):
            continue
        prefix = f"{path}." if path else ""
        if is_quantised(module):
            inside = prefix
            yield LogicalParameter(f"{prefix}weight", (module.out_features, module.in_features), (id(module), "weight"))
            if isinstance(getattr(module, "bias", None), Tensor):
                yield LogicalParameter(f"{prefix}bias", (module.out_features,), (id(module), "bias"))
            continue
        packed = _packed_parameters(module)
        if packed:
            inside = f"{prefix}parametrizations."
            yield from (LogicalParameter(prefix + name, shape, (id(module), name)) for name, shape in packed.items())
        for name, parameter in module.named_parameters(recurse=False):
            yield LogicalParameter(prefix + name, tuple(parameter.shape), id(parameter))


def num_parameters(parameters: Iterable[LogicalParameter]) -> int:
    """Count the elements of parameters. Tied ones count once."""
    return sum({parameter.identity: math.prod(parameter.shape) for parameter in parameters}.values())


def _packed_parameters(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the logical shapes of parameters that a parametrisation unpacks (bitsandbytes' stacked experts)."""
    if not parametrize.is_parametrized(module):
        return {}
    lists: Any = module.parametrizations
    states = {name: getattr(chain[0], "quant_state", None) for name, chain in lists.items()}
    return {name: tuple(state.shape) for name, state in states.items() if state is not None}


def _is_of_model_code(module: nn.Module) -> bool:
    """Return whether a class is defined by the model's code, whose layers may compute anything."""
    return "modeling_" in type(module).__module__ or type(module).__module__.startswith("transformers_modules")
