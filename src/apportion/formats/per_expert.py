"""LoRA with one pair of factors per expert and projection, under checkpoint names: what inference servers load.

Servers take the experts of a layer whole and have one rank for everything, so experts without an adapter and missing
ranks are zeros. They differ in which patterns of ranks and scales they read, so there are none: the scale is in B.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from apportion.errors import ConfigurationError
from apportion.formats.checkpoint_names import checkpoint_name
from apportion.formats.factors import SavedAdapter
from apportion.formats.pairs import Pair, folded, nonzero, padded
from apportion.formats.peft_lora import PREFIX, Contents, write_contents
from apportion.records.outputs import ADAPTER_CONFIG_FILE, ADAPTER_TENSORS_FILE
from apportion.records.site import Site

PACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # servers keep each of these in one matrix


def largest_rank(adapter: SavedAdapter) -> int:
    """Return the rank that everything is padded to."""
    return max(placement.shape.lora_rank or 0 for placement in adapter.placements)


def write(adapter: SavedAdapter, folder: Path, dtype: torch.dtype | None, targets: Iterable[str] | None = None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        adapter: The adapter.
        folder: The output folder.
        dtype: Type of the factors; as they are stored if None.
        targets: What the configuration names as target modules; the last parts of the names written if None.
    """
    rank, result, lasts = largest_rank(adapter), Contents(), set()
    for pair in _completed(adapter, list(folded(adapter, dtype))):
        name = checkpoint_name(pair.site.name, adapter.layout.model_type)
        result.add(name, *padded(pair, rank)[1:])
        lasts.add(name.rpartition(".")[2])
    result.ranks, result.modules = {"": rank}, list(lasts if targets is None else targets)
    write_contents(adapter, folder, result)


def _completed(adapter: SavedAdapter, pairs: list[Pair]) -> Iterator[Pair]:
    """Go through the pairs, and zeros for sites that a server needs beside them."""
    by_name = {pair.site.name: pair for pair in pairs}
    first = pairs[0]
    needed = {**dict.fromkeys(by_name), **dict.fromkeys(site.name for site in _needed(adapter))}
    for name in needed:
        site = adapter.layout.by_name[name]
        a_RI, b_OR = first.a_RI.new_zeros(1, site.in_features), first.b_OR.new_zeros(site.out_features, 1)
        yield by_name.get(name, Pair(site, a_RI, b_OR))


def _needed(adapter: SavedAdapter) -> Iterator[Site]:
    """List all experts of the adapted layers, and the matrices that share one with an adapted matrix."""
    modules = {placement.name.module for placement in adapter.placements}
    for block in adapter.layout.blocks:
        if block.name in modules:
            yield from (block.site(expert, each) for expert in range(block.num_experts) for each in block.projections)
    for module in modules:
        parent, _, last = module.rpartition(".")
        names = next((packed for packed in PACKED if last in packed), ())
        yield from (
            adapter.layout.by_name[name] for each in names if (name := f"{parent}.{each}") in adapter.layout.by_name
        )


def read_back(adapter: SavedAdapter, folder: Path) -> Iterator[Pair]:
    """Read a folder that `write` wrote, by the rules of the servers' loaders.

    Args:
        adapter: The adapter that was written.
        folder: The folder.

    Yields:
        The pairs that are not zero.

    Raises:
        ConfigurationError: a name, a rank or the set of experts is none that servers load.
    """
    tensors, config = load_file(folder / ADAPTER_TENSORS_FILE), LoraConfig.from_pretrained(folder)
    sites = {checkpoint_name(site.name, adapter.layout.model_type): site for site in adapter.layout.sites()}
    names = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors}
    ranks = {tensors[f"{PREFIX}{name}.lora_A.weight"].shape[0] for name in names}
    missing = {checkpoint_name(site.name, adapter.layout.model_type) for site in _needed(adapter)} - names
    if names - sites.keys() or missing or ranks != {config.r} or config.lora_alpha != config.r or config.rank_pattern:
        raise ConfigurationError(
            f"{folder} is not what inference servers load.",
            place=ADAPTER_CONFIG_FILE,
            details={"unknown": sorted(names - sites.keys()), "missing": sorted(missing), "ranks": str(ranks)},
        )
    for name in sorted(names):
        yield from nonzero(Pair(sites[name], *(tensors[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")))
