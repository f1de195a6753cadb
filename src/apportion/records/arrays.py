"""Arrays in safetensors files, with a digest to detect damage."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from apportion.records.files import seal

Array = NDArray[Any]


class ArrayFileError(ValueError):
    """A file is not a safetensors file, or is damaged."""


def read_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Array]]:
    """Read a safetensors file.

    Args:
        path: The file.

    Returns:
        Its metadata, and its arrays by name.

    Raises:
        ArrayFileError: the file cannot be read, or has a dtype that NumPy does not support.
    """
    try:
        with safe_open(path, framework="np") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            return metadata, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ArrayFileError(str(error)) from error


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, str], list[str]]:
    """Read the metadata of a safetensors file and the names of its tensors, without the tensors.

    Args:
        path: The file.

    Returns:
        Its metadata, and the names.

    Raises:
        ArrayFileError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="np") as opened:
            return opened.metadata() or {}, list(opened.keys())
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ArrayFileError(str(error)) from error


def as_array(values: Any) -> Array:
    """Convert a tensor on any device, or any array-like, to a NumPy array.

    Args:
        values: A tensor, an array or numbers.

    Returns:
        The array. It shares memory with a CPU tensor.
    """
    return values.numpy(force=True) if hasattr(values, "numpy") else np.asarray(values)


def digest(header: dict[str, Any], arrays: Mapping[str, Array]) -> str:
    """Hash a header and each array's name, dtype, shape and bytes.

    Args:
        header: Plain data.
        arrays: Arrays by name.

    Returns:
        SHA-256, in hex.
    """
    total = hashlib.sha256(seal(header).encode())
    for name in sorted(arrays):
        array = arrays[name]
        total.update(f"{name}|torch.{array.dtype}|{array.shape}|".encode())
        total.update(array.tobytes())
    return total.hexdigest()
