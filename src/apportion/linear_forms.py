"""The forms in which models hold a weight matrix: linear layers, and what quantisers put in their place.

A quantised layer stores its weight packed, under any name and in any shape. What it computes is still a product with
one matrix of ``out_features`` by ``in_features``: its logical shape, which sites and fingerprints are about.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

PLAIN_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LogicalParameter(NamedTuple):
    """A parameter as it was before it was quantised: its path, its shape, and what tied parameters share."""

    name: str
    shape: tuple[int, ...]
    identity: int | tuple[int, str]


def is_linear(module: nn.Module) -> bool:
    """Tell linear layers, quantised ones of any class included."""
    return isinstance(module, nn.Linear) or is_quantised(module)


def is_quantised(module: Any) -> bool:
    """Tell a linear layer whose weight is not stored as the matrix that it stands for.

    Args:
        module: Any module.

    Returns:
        Whether it is one: it says how wide its input and its output are, holds no plain weight of that shape, and is
        neither a layer of the model's own code, nor parametrised, nor a wrapper around another linear layer.
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
    """Tell linear layers that a model's own code makes into something else: routers, block-diagonal products."""
    if is_quantised(module):
        return "Grouped" in type(module).__name__
    return "modeling_" in type(module).__module__ and type(module).forward is not nn.Linear.forward


def matrix_shape(module: Any) -> tuple[int, int] | None:
    """Give the logical shape of a module's weight matrix.

    Args:
        module: Any module.

    Returns:
        Its output and its input width; None where the module has no ``weight`` of two dimensions.
    """
    if is_quantised(module):
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.ndim == 2:
        width_out, width_in = weight.shape
        return int(width_out), int(width_in)
    return None


def logical_parameters(modules: Mapping[str, Any]) -> Iterator[LogicalParameter]:
    """Go through a model's parameters as they would be without quantisation.

    Of a quantised layer these are the weight and, where there is one, the bias; scales and other helpers are left out.

    Args:
        modules: All modules by path, parents first.

    Yields:
        The parameters, tied ones each time they come.
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
    """Count the numbers in parameters; tied ones count once."""
    return sum({parameter.identity: math.prod(parameter.shape) for parameter in parameters}.values())


def _packed_parameters(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Give the logical shapes of parameters that a parametrisation unpacks (bitsandbytes' way with stacked experts)."""
    if not parametrize.is_parametrized(module):
        return {}
    lists: Any = module.parametrizations
    states = {name: getattr(chain[0], "quant_state", None) for name, chain in lists.items()}
    return {name: tuple(state.shape) for name, state in states.items() if state is not None}


def _is_of_model_code(module: nn.Module) -> bool:
    """Tell whether a class belongs to a model's own code, whose layers may compute anything."""
    return "modeling_" in type(module).__module__ or type(module).__module__.startswith("transformers_modules")
