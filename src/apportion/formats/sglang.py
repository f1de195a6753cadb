"""LoRA for SGLang: pairs per expert, without routers."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

import torch

from apportion.formats import per_expert
from apportion.formats.factors import SavedAdapter
from apportion.formats.support import SGLANG, check_applied


def check(adapter: SavedAdapter) -> None:
    """Refuse an adapter that SGLang would not apply whole.

    Args:
        adapter: The adapter.

    Raises:
        ConfigurationError: SGLang has no adapters for a part of it, or its code was not read for the architecture.
    """
    check_applied(SGLANG, adapter)


def write(adapter: SavedAdapter, folder: Path, dtype: torch.dtype | None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    SGLang sizes its buffers by target modules, which it knows by the module's names alone, and takes tensors by either.

    Args:
        adapter: An adapter that `check` accepts.
        folder: The output folder.
        dtype: Type of the factors; as they are stored if None.
    """
    targets = {each.name.projection or each.site.rpartition(".")[2] for each in adapter.placements}
    for packed in per_expert.PACKED:
        targets |= set(packed) if targets & set(packed) else set()
    if any(placement.name.is_expert for placement in adapter.placements):
        targets |= {"gate_proj", "up_proj", "down_proj"}
    per_expert.write(adapter, folder, dtype, targets)


def use(adapter: SavedAdapter, folder: Path, base: str) -> str:
    """Return how to serve the folder.

    Args:
        adapter: The adapter.
        folder: The folder.
        base: The base model's name.

    Returns:
        Markdown.
    """
    return f"""```sh
python -m sglang.launch_server --model-path {quote(base)} --enable-lora --lora-paths {quote(f"{folder.name}={folder}")}
```

Requests name the adapter: `"lora_path": "{folder.name}"`. Several adapters: more `NAME=FOLDER` after `--lora-paths`.
For adapters of {adapter.layout.model_type}, SGLang {SGLANG.version}: {SGLANG.checked}.
"""
