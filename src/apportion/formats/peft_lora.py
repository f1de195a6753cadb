"""Stock PEFT's LoRA: loads with `PeftModel.from_pretrained` and transformers' `load_adapter`, without apportion."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from apportion.formats.factors import SavedAdapter
from apportion.formats.fused import FusedParameter, fused_parameters
from apportion.formats.pairs import Pair, folded, padded
from apportion.formats.support import check_foldable
from apportion.records.files import whole_file, write_text
from apportion.records.outputs import ADAPTER_CONFIG_FILE, ADAPTER_TENSORS_FILE
from apportion.records.site import Site

PREFIX = "base_model.model."

# In a model with stacked experts, PEFT takes target modules with these names for the experts and the router, and leaves
# shared experts and dense layers of the same names without an adapter. Their weights are named as parameters instead.
_TAKEN_FOR_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


@dataclass
class Contents:
    """An adapter in PEFT's terms.

    Args:
        tensors: Factors by their names in the file.
        ranks: Ranks by the path that PEFT finds the adapter by.
        modules: Targeted modules.
        parameters: Targeted parameters.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)

    def add(self, key: str, a: Tensor, b: Tensor) -> None:
        """Add a pair of factors under a module's name in the file."""
        self.tensors[f"{PREFIX}{key}.lora_A.weight"] = a.contiguous()
        self.tensors[f"{PREFIX}{key}.lora_B.weight"] = b.contiguous()


def check(adapter: SavedAdapter) -> None:
    """Refuse an adapter that PEFT cannot express.

    Args:
        adapter: The adapter.

    Raises:
        ConfigurationError: it has routed LoRA experts, or stands on experts that PEFT cannot adapt.
    """
    check_foldable(adapter.placements)
    stacked_parameters(adapter)


def write(adapter: SavedAdapter, folder: Path, dtype: torch.dtype | None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        adapter: An adapter that `check` accepts.
        folder: The output folder.
        dtype: Type of the factors; as they are stored if None.
    """
    write_contents(adapter, folder, contents(adapter, dtype))


def contents(adapter: SavedAdapter, dtype: torch.dtype | None, rank: int | None = None) -> Contents:
    """Put an adapter in PEFT's terms: the scale folded in, the experts of a layer fused.

    Args:
        adapter: The adapter.
        dtype: Type of the factors; as they are stored if None.
        rank: One rank for everything, and all parameters of adapted experts, padded with zeros; each its own rank, and
            only what is adapted, if None.

    Returns:
        The adapter.
    """
    result = Contents()
    fused, by_parameter = stacked_parameters(adapter), dict[str, list[Pair]]()
    path_of = {site.name: parameter.path for parameter in fused for site in parameter.sites.values()}
    for pair in folded(adapter, dtype):
        site = pair.site
        if site.storage == "fused":
            by_parameter.setdefault(path_of[site.name], []).append(pair)
            continue
        result.add(site.name, *padded(pair, rank or pair.a_RI.shape[0])[1:])
        path = _target(adapter, site, result)
        result.ranks[path] = rank or pair.a_RI.shape[0]
    for parameter, key in nested(each for each in fused if rank or each.path in by_parameter):
        pairs = by_parameter.get(parameter.path) or [parameter.zero(dtype or torch.float32)]
        result.ranks[parameter.path] = rank or parameter.own_rank(pairs)
        result.parameters.append(parameter.path)
        result.add(key, *parameter.fuse(pairs, result.ranks[parameter.path]))
    return result


def largest_rank(adapter: SavedAdapter) -> int:
    """Return the largest rank in PEFT's terms: where projections of an expert share a parameter, the sum of theirs."""
    path_of = {site.name: each.path for each in stacked_parameters(adapter) for site in each.sites.values()}
    ranks: Counter[tuple[str, int | None]] = Counter()
    for placement in adapter.placements:
        ranks[path_of.get(placement.site, placement.site), placement.name.expert] += placement.shape.lora_rank or 0
    return max(ranks.values())


def _target(adapter: SavedAdapter, site: Site, result: Contents) -> str:
    """Name a site as a target, and return the path that PEFT finds its rank by."""
    last = site.name.rpartition(".")[2]
    if site.storage == "linear" and not (adapter.layout.is_moe and last in _TAKEN_FOR_EXPERTS):
        result.modules.append(site.name)
        return site.name
    result.parameters.append(f"{site.name}.weight")
    return f"{site.name}.weight"


def nested(parameters: Iterator[FusedParameter]) -> Iterator[tuple[FusedParameter, str]]:
    """Name the stacked parameters of an adapter as PEFT does.

    Args:
        parameters: The parameters, in the model's order.

    Yields:
        Each with its module's name in the file: PEFT wraps a module once per parameter, the last one outermost.
    """
    by_module: dict[str, list[FusedParameter]] = {}
    for parameter in parameters:
        by_module.setdefault(parameter.module, []).append(parameter)
    for module, inside in by_module.items():
        for depth, parameter in enumerate(reversed(inside)):
            yield parameter, module + ".base_layer" * depth


def stacked_parameters(adapter: SavedAdapter) -> list[FusedParameter]:
    """List the stacked parameters of the layers on whose experts an adapter stands.

    Args:
        adapter: The adapter.

    Returns:
        The parameters, in the model's order.

    Raises:
        ConfigurationError: PEFT cannot adapt them.
    """
    touched = {placement.name.module for placement in adapter.placements if placement.name.is_expert}
    blocks = [block for block in adapter.layout.blocks if block.name in touched and block.storage == "fused"]
    if not blocks:
        return []
    model = adapter.empty_base()
    return [parameter for block in blocks for parameter in fused_parameters(model.get_submodule(block.name), block)]


def write_contents(adapter: SavedAdapter, folder: Path, written: Contents) -> None:
    """Write an adapter in PEFT's terms.

    Args:
        adapter: The adapter.
        folder: The output folder.
        written: What to write.
    """
    rank = Counter(written.ranks.values()).most_common(1)[0][0]
    others = {path: own for path, own in written.ranks.items() if own != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(written.modules),
        target_parameters=sorted(written.parameters) or None,
        rank_pattern=others,
        alpha_pattern=dict(others),
        task_type=adapter.config.task_type,
        base_model_name_or_path=adapter.config.base_model_name_or_path,
        inference_mode=True,
    )
    with whole_file(folder / ADAPTER_TENSORS_FILE) as temporary:
        save_file(written.tensors, temporary, metadata={"format": "pt"})
    write_text(folder / ADAPTER_CONFIG_FILE, _as_json(config))


def use(adapter: SavedAdapter, folder: Path, base: str) -> str:
    """Return how to load the folder.

    Args:
        adapter: The adapter.
        folder: The folder.
        base: The base model's name.

    Returns:
        Markdown.
    """
    notes = """
PEFT warns that the rank and alpha patterns of stacked experts match no module, but it uses them. Adapters loaded into
one model together must stand on the same stacked experts.
"""
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, {str(folder)!r})  # or model.load_adapter(...) of transformers
```
{notes if any(placement.name.is_expert for placement in adapter.placements) else ""}"""


def _as_json(config: LoraConfig) -> str:
    """Write a configuration as PEFT does."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return Path(folder, ADAPTER_CONFIG_FILE).read_text()
