"""Numbers that never change, as tensors that are made once per device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers that never change as a tensor; they are copied to each device once.

    Args:
        values: The numbers, whole or not.
        device: Where they are needed.

    Returns:
        Shape (len(values),).
    """
    if torch.compiler.is_compiling():
        return torch.tensor(values, device=device)
    return _constant(values, device)


@functools.lru_cache(maxsize=4096)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Make a constant once."""
    with torch.inference_mode(mode=False):
        return torch.tensor(values, device=device)
