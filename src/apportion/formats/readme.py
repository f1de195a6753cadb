"""The README of an exported adapter: what it is, what was changed on the way, and how to serve it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from apportion._version import __version__
from apportion.formats.factors import SavedAdapter
from apportion.formats.pairs import folded

README_FILE = "README.md"
USE = "\n## Use\n\n"


@dataclass(frozen=True)
class Written:
    """How an adapter was written.

    Args:
        readers: What reads it.
        base: The base model that it belongs to.
        dtype: Type of the factors; as they were stored if None.
        use: How to use it, in Markdown.
    """

    readers: str
    base: str
    dtype: torch.dtype | None
    use: str | None


def readme(adapter: SavedAdapter, folder: Path, form: Written) -> str:
    """Describe an exported adapter.

    Args:
        adapter: The adapter.
        folder: The folder that it was written to.
        form: How it was written.

    Returns:
        The text.
    """
    plan = adapter.plan
    kinds = Counter(adapter.layout.by_name[placement.site].kind for placement in adapter.placements)
    sites = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    return f"""# LoRA adapter for {form.base}

For {form.readers}. Written by apportion {__version__} from {os.fspath(adapter.folder)}.

- Base model: `{form.base}` ({adapter.layout.describe()}).
- Placement: method `{plan.method}`; adapted matrices: {sites}.
- {_folded(adapter)}
- {_size(adapter, folder, form.dtype)}
{"" if form.use is None else f"{USE}{form.use}"}"""


def _folded(adapter: SavedAdapter) -> str:
    """Describe what was folded."""
    text = "Folded: the scale alpha / rank is part of B, so readers must use a scale of 1 (`lora_alpha` equals `r`)."
    if adapter.plan.is_sparse:
        text += " The frozen A is written out, and the sparse B with its zeros."
    if "router" in adapter.left_out:
        text += " The routers' part is not in this adapter: it was added to the base model in `base`."
    return text


def _size(adapter: SavedAdapter, folder: Path, dtype: torch.dtype | None) -> str:
    """Compare the folder's size with the factors alone."""
    written = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    needed = sum(
        factor.numel() * factor.element_size() for _, a_RI, b_OR in folded(adapter, dtype) for factor in (a_RI, b_OR)
    )
    return (
        f"Size: {written:,} bytes, {written / needed:.1f} times the adapter's own factors ({needed:,} bytes in this "
        "type). The rest is zeros for experts and ranks that are not adapted, and headers."
    )
