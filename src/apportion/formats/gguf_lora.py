"""llama.cpp's LoRA: one GGUF file, written without llama.cpp and without the base model's weights.

llama.cpp multiplies by alpha / rank of each tensor, and by nothing where alpha is 0. So alpha is 0, the scale is in B,
and every tensor keeps its own rank; the experts of a tensor share one.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from apportion.errors import ConfigurationError, MissingDependencyError
from apportion.formats.factors import SavedAdapter
from apportion.formats.pairs import Pair, folded, nonzero, padded
from apportion.formats.support import LLAMA_CPP, check_applied
from apportion.records.files import whole_file
from apportion.records.site import Site
from apportion.records.site_name import SiteName

# E experts, R rank, I and O the site's input and output width.

FILE = "adapter.gguf"

# The names that llama.cpp knows the architectures by, as `gguf.MODEL_ARCH` spells them.
ARCHITECTURES = {
    "olmoe": "OLMOE", "mixtral": "LLAMA", "qwen3_moe": "QWEN3MOE", "gpt_oss": "GPT_OSS", "deepseek_v2": "DEEPSEEK2",
    "deepseek_v3": "DEEPSEEK2", "llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3",
}  # fmt: skip

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def check(adapter: SavedAdapter) -> None:
    """Refuse an adapter that llama.cpp would not apply whole.

    Args:
        adapter: The adapter.

    Raises:
        MissingDependencyError: gguf is not installed.
        ConfigurationError: llama.cpp would leave a part of the adapter out, or was not checked for the architecture.
    """
    if find_spec("gguf") is None:
        raise MissingDependencyError("GGUF files", package="gguf", extra="gguf")
    check_applied(LLAMA_CPP, adapter)


def write(adapter: SavedAdapter, folder: Path, dtype: torch.dtype | None) -> None:
    """Write ``adapter.gguf``.

    Args:
        adapter: An adapter that `check` accepts.
        folder: The output folder.
        dtype: Type of the factors; as they are stored if None.
    """
    import gguf

    names = _Names(adapter)
    with whole_file(folder / FILE) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[names.architecture])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        for tensor, pairs in names.by_tensor(folded(adapter, dtype)):
            for part, factor in zip("ab", _stacked(adapter, pairs), strict=True):
                kind = gguf.GGMLQuantizationType[_TYPES[factor.dtype]]
                data = gguf.quantize(factor.float().numpy(), kind)
                writer.add_tensor(f"{tensor}.lora_{part}", data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _stacked(adapter: SavedAdapter, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Stack the pairs of a tensor's experts, with zeros for experts that have none; a single matrix stays as it is."""
    site, a_RI, b_OR = pairs[0]
    if site.expert is None:
        return a_RI, b_OR
    block = next(block for block in adapter.layout.blocks if site.name.startswith(block.name + "."))
    rank = max(pair.a_RI.shape[0] for pair in pairs)
    a_ERI = a_RI.new_zeros(block.num_experts, rank, a_RI.shape[1])
    b_EOR = b_OR.new_zeros(block.num_experts, b_OR.shape[0], rank)
    for pair in pairs:
        _, a_ERI[pair.site.expert or 0], b_EOR[pair.site.expert or 0] = padded(pair, rank)
    return a_ERI, b_EOR


class _Names:
    """Where llama.cpp keeps a model's sites: the tensor's name, and the order of its rows."""

    def __init__(self, adapter: SavedAdapter) -> None:
        import gguf

        self.adapter = adapter
        self.architecture = gguf.MODEL_ARCH[ARCHITECTURES[adapter.layout.model_type]]
        num_layers = 1 + max(site.layer for site in adapter.layout.sites())
        self._map = gguf.get_tensor_name_map(self.architecture, num_layers)
        config = adapter.empty_base().config.get_text_config()
        self._heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}

    def tensor(self, site: Site) -> str:
        """Name the tensor that holds a site."""
        module, _, projection = SiteName.parse(site.name)
        name = module if projection is None else f"{module}.{projection}"
        tensor: str | None = self._map.get_name(f"{name}.weight", try_suffixes=(".weight",))
        if tensor is None:
            raise ConfigurationError(f"{site.name} has no name in llama.cpp.", fix="merge the adapter into the model")
        return tensor

    def by_tensor(self, pairs: Iterator[Pair]) -> Iterator[tuple[str, list[Pair]]]:
        """Group pairs by the tensor that holds their sites, with B's rows in llama.cpp's order."""
        grouped: dict[str, list[Pair]] = {}
        for pair in pairs:
            permuted = pair._replace(b_OR=self.permuted(pair.site, pair.b_OR))
            grouped.setdefault(self.tensor(pair.site), []).append(permuted)
        yield from grouped.items()

    def permuted(self, site: Site, b_OR: Tensor, *, back: bool = False) -> Tensor:
        """Reorder the rows of q and k where llama.cpp rotates neighbours instead of halves."""
        if ARCHITECTURES[self.adapter.layout.model_type] != "LLAMA" or site.projection not in self._heads:
            return b_OR
        heads, rank = self._heads[site.projection], b_OR.shape[1]
        parts = (heads, -1, 2, rank) if back else (heads, 2, b_OR.shape[0] // heads // 2, rank)
        return b_OR.reshape(parts).swapaxes(1, 2).reshape(b_OR.shape)


def read_back(adapter: SavedAdapter, folder: Path) -> Iterator[Pair]:
    """Read a file that `write` wrote.

    Args:
        adapter: The adapter that was written.
        folder: The folder.

    Yields:
        The pairs that are not zero.
    """
    import gguf

    names, tensors = _Names(adapter), {each.name: each for each in gguf.GGUFReader(folder / FILE).tensors}
    touched = {placement.name.module for placement in adapter.placements}
    for site in adapter.layout.sites():
        own = f"{names.tensor(site)}.lora_" if SiteName.parse(site.name).module in touched else None
        if own is None or f"{own}a" not in tensors:
            continue
        a_RI, b_OR = (_values(tensors[own + part], site.expert) for part in "ab")
        yield from nonzero(Pair(site, a_RI, names.permuted(site, b_OR, back=True)))


def _values(tensor: Any, expert: int | None) -> Tensor:
    """Read one matrix of a tensor in the type of the file."""
    import gguf

    stored = next(dtype for dtype, name in _TYPES.items() if name == tensor.tensor_type.name)
    part = tensor.data if expert is None else tensor.data[expert]
    return torch.tensor(gguf.dequantize(part, tensor.tensor_type)).to(stored)


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
# once, with llama.cpp's converter: the base model as GGUF
python convert_hf_to_gguf.py {quote(base)} --outfile base.gguf
llama-server -m base.gguf --lora {quote(str(folder / FILE))}
```

Several adapters: repeat `--lora`. Each request chooses with `"lora": [{{"id": 0, "scale": 1.0}}]`. Adapters of
{adapter.layout.model_type} were checked with llama.cpp {LLAMA_CPP.version}.
"""
