"""LoRA for vLLM: pairs per expert, or PEFT's fused layout for the architectures that vLLM reads so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shlex import quote

import torch

from apportion.errors import ConfigurationError
from apportion.formats import peft_loaded, peft_lora, per_expert
from apportion.formats.factors import SavedAdapter
from apportion.formats.pairs import Pair
from apportion.formats.support import VLLM, check_applied

_FUSED = ("gpt_oss",)
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank


def check(adapter: SavedAdapter) -> None:
    """Refuse an adapter that vLLM would not apply whole.

    Args:
        adapter: The adapter.

    Raises:
        ConfigurationError: vLLM would leave a part of the adapter out, was not checked for the architecture, or has no
            room for its rank.
    """
    check_applied(VLLM, adapter)
    if _rank(adapter) > _RANKS[-1]:
        raise ConfigurationError(
            f"vLLM takes ranks up to {_RANKS[-1]}, and the adapter needs {_rank(adapter)}.",
            fix="merge the adapter into the model (apportion merge)",
        )


def write(adapter: SavedAdapter, folder: Path, dtype: torch.dtype | None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        adapter: An adapter that `check` accepts.
        folder: The output folder.
        dtype: Type of the factors; as they are stored if None.
    """
    if _is_fused(adapter):
        peft_lora.write_contents(adapter, folder, peft_lora.contents(adapter, dtype, rank=_rank(adapter)))
    else:
        per_expert.write(adapter, folder, dtype)


def read_back(adapter: SavedAdapter, folder: Path) -> Iterator[Pair]:
    """Read a folder that `write` wrote.

    Args:
        adapter: The adapter that was written.
        folder: The folder.

    Returns:
        The pairs that are not zero.
    """
    return peft_loaded.read_back(adapter, folder) if _is_fused(adapter) else per_expert.read_back(adapter, folder)


def _is_fused(adapter: SavedAdapter) -> bool:
    """Return whether vLLM reads the experts of an adapter fused."""
    return adapter.layout.model_type in _FUSED


def _rank(adapter: SavedAdapter) -> int:
    """Return the rank that the file has everywhere: for fused gate and up, the sum of theirs."""
    if not _is_fused(adapter):
        return per_expert.largest_rank(adapter)
    return peft_lora.largest_rank(adapter)


def use(adapter: SavedAdapter, folder: Path, base: str) -> str:
    """Return how to serve the folder.

    Args:
        adapter: The adapter.
        folder: The folder.
        base: The base model's name.

    Returns:
        Markdown.
    """
    room = next(rank for rank in _RANKS if rank >= _rank(adapter))
    return f"""```sh
vllm serve {quote(base)} --enable-lora --max-lora-rank {room} --lora-modules {quote(f"{folder.name}={folder}")}
```

Requests name the adapter: `"model": "{folder.name}"`. Several adapters: more `NAME=FOLDER` after `--lora-modules`, and
`--max-loras`. Adapters of {adapter.layout.model_type} were checked with vLLM {VLLM.version}: {VLLM.checked}.
"""
