"""Tensors in files: read whole, with a digest that tells a damaged file from a good one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apportion.records.files import seal


class TensorFileError(ValueError):
    """A file is no safetensors file, or is damaged."""


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read a safetensors file.

    Args:
        path: The file.

    Returns:
        Its metadata, and its tensors by name.

    Raises:
        TensorFileError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            return metadata, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise TensorFileError(str(error)) from error


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
