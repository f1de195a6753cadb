"""Which base weights an adapter can be added to: plain floating-point parameters, and nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from apportion.compat.torch import stored_parameters
from apportion.linear_forms import PLAIN_TYPES


def obstacle(module: nn.Module, parameter: str) -> str | None:
    """Return why numbers cannot be added to a parameter.

    Adding to the weight of a parametrised or quantised module changes a temporary copy, or what the quantised numbers
    mean, and raises nothing.

    Args:
        module: The module.
        parameter: The parameter's path in it.

    Returns:
        The reason, in words that follow the parameter's name; None where they can be added.
    """
    owner_path, _, name = parameter.rpartition(".")
    owner: Any = module.get_submodule(owner_path)
    stored = stored_parameters(owner).get(name)
    if stored is None:
        return "is computed from other parameters"
    if isinstance(stored, DTensor):
        return "is sharded over processes"
    if type(stored) is not nn.Parameter or stored.dtype not in PLAIN_TYPES:
        return f"is quantised ({type(stored).__name__}, {stored.dtype})"
    if stored.is_meta or stored.numel() == 0:
        return "is not in memory"
    return None
