"""What is known of one kind of file: how a good one is read, damaged and judged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.errors import ApportionError
from faults.mutations import BYTES, TEXT, BytesMutation, change_json_bytes, change_safetensors

JSON = (*BYTES, *TEXT, *[change_json_bytes] * 8)
TENSORS = (*BYTES, *[change_safetensors] * 8)


class RefusedError(ApportionError):
    """A reader warned and gave nothing, which counts as a refusal."""


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Args:
        name: Its name.
        path: A good file.
        read: Reads a file at that path, and gives plain contents that can be compared with ==.
        mutations: What a mutant is made by, one drawn for each.
        judge: Says what is wrong with other contents than the good file's; None where they are possible.
        mutants: Number of mutants.
        named: What a refusal's message has to contain, if not the file's name.
    """

    name: str
    path: Path
    read: Callable[[], Any]
    mutations: tuple[BytesMutation, ...]
    judge: Callable[[Any], str | None]
    mutants: int = 120
    named: str = ""


def restore(kind: Kind, data: bytes) -> None:
    """Put a file's bytes in its place, which may have become a folder or have gone."""
    if kind.path.is_dir():
        shutil.rmtree(kind.path)
    kind.path.write_bytes(data)
