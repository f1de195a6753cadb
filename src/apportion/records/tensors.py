"""Tensors in files: a digest that tells a damaged file from a good one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from apportion.records.files import seal


def digest(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hash a header and every tensor's name, type, shape and bytes.

    Args:
        header: Plain data.
        tensors: Tensors by name, of any type, on the CPU.

    Returns:
        SHA-256.
    """
    total = hashlib.sha256(seal(header).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
