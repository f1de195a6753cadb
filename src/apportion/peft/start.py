"""Initial values of factors: A and routers are drawn from the seed and the site's name; B is zero."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from apportion.adapters.factors import FrozenFactor, matrix_of
from apportion.adapters.hosts.experts import ExpertLora
from apportion.adapters.hosts.linear import LinearLora
from apportion.adapters.hosts.weight import WeightLora
from apportion.discovery import walk_modules
from apportion.records.plan import Plan
from apportion.records.site import Site


@torch.no_grad()
def start_factors(model: nn.Module, adapter_name: str, seed: int, *, frozen: bool) -> None:
    """Draw an adapter's A matrices, Kaiming-uniform as in PEFT, each from its own generator.

    Args:
        model: The model with the adapter.
        adapter_name: The adapter.
        seed: The seed.
        frozen: True draws the frozen A matrices; False draws the trainable ones and the routers.
    """
    for site, a_RI, is_frozen in _matrices(model, adapter_name):
        if is_frozen == frozen:
            draw(a_RI, site, seed)


def drawn_checksum(plan: Plan, sites: Mapping[str, Site], seed: int) -> str | None:
    """Hash the frozen A matrices that a seed draws for a sparse plan. No model is needed.

    Args:
        plan: The plan.
        sites: The model's sites by name.
        seed: The seed.

    Returns:
        SHA-256, or None if no A is frozen.
    """
    if not plan.is_sparse:
        return None
    total = hashlib.sha256()
    for placement in plan.placements:
        if placement.sparsity:
            a_RI = torch.empty(placement.total_rank, sites[placement.site].in_features)
            draw(a_RI, placement.site, seed)
            total.update(placement.site.encode())
            total.update(a_RI.numpy().tobytes())
    return total.hexdigest()


def _matrices(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor, bool]]:
    """Iterate over an adapter's A matrices and routers: the name for the draw, the matrix, whether it is frozen."""
    for path, called, base in walk_modules(model):
        if called is base or adapter_name not in getattr(called, "lora_A", {}):
            continue
        if isinstance(called, ExpertLora):
            for name, factors in called.factors[adapter_name].items():
                factor = called.lora_A[adapter_name][name]
                parts = torch.split(matrix_of(factor).data, list(factors.ranks))
                for expert, a_RI in zip(factors.experts, parts, strict=True):
                    yield f"{path}.{expert}.{name}", a_RI, isinstance(factor, FrozenFactor)
        elif isinstance(called, (LoraLayer, LinearLora, WeightLora)):
            factor = called.lora_A[adapter_name]
            yield path, matrix_of(factor).data, isinstance(factor, FrozenFactor)
            if isinstance(called, LinearLora) and adapter_name in called.lora_router:
                yield f"{path}.lora_router", called.lora_router[adapter_name].weight.data, False


def draw(a_RI: Tensor, site: str, seed: int) -> None:
    """Fill one matrix from its own generator. The bound 1/sqrt(in) is that of PEFT's initialisation.

    The values equal those of `uniform_` on a processor with fused multiply-add, which rounds once. The sum is exact in
    float64, so every processor rounds it to the same float32.

    Args:
        a_RI: The matrix to fill; one on the meta device is left as it is.
        site: The site's name.
        seed: The seed.
    """
    if a_RI.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{site}".encode()).digest()[:7]))
    bound = torch.tensor(1 / math.sqrt(a_RI.shape[1]), dtype=torch.float32).double()
    share = torch.rand(a_RI.shape, generator=generator, dtype=torch.float32).double()
    a_RI.copy_((2 * bound * share - bound).float())
