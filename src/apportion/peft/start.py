"""Initial values of factors: drawn from the seed and the site's name, or zero."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apportion.peft.hosted import hosted
from apportion.records.plan import Plan
from apportion.records.site import Site


@dataclass(frozen=True)
class FrozenDraws:
    """The frozen A matrices that a seed draws for a sparse plan.

    Args:
        tensors: The matrices by site, on the CPU.
        checksum: SHA-256 over all of them.
    """

    tensors: Mapping[str, Tensor]
    checksum: str


def draw_frozen(plan: Plan, sites: Mapping[str, Site], seed: int) -> FrozenDraws | None:
    """Draw the frozen A matrices of a sparse plan. No model is needed.

    Args:
        plan: The plan.
        sites: The model's sites by name.
        seed: The seed.

    Returns:
        The matrices, or None if no A is frozen.
    """
    if not plan.is_sparse:
        return None
    tensors: dict[str, Tensor] = {}
    total = hashlib.sha256()
    for placement in plan.placements:
        if placement.sparsity:
            a_RI = torch.empty(placement.total_rank, sites[placement.site].in_features)
            draw(a_RI, placement.site, seed)
            total.update(placement.site.encode())
            total.update(a_RI.numpy().data)
            tensors[placement.site] = a_RI
    return FrozenDraws(tensors, total.hexdigest())


@torch.no_grad()
def start_factors(
    model: nn.Module, adapter_name: str, seed: int, frozen: FrozenDraws | None, *, only_frozen: bool = False
) -> None:
    """Set an adapter's tensors to their initial values, Kaiming-uniform as in PEFT, each from its own generator.

    Args:
        model: The model with the adapter.
        adapter_name: The adapter.
        seed: The seed.
        frozen: The frozen A matrices, already drawn from the same seed.
        only_frozen: Leave all other tensors as they are, because they are loaded next.
    """
    drawn = {} if frozen is None else frozen.tensors
    for path, adapter in hosted(model, adapter_name):

        def fill(tensor: Tensor, name: str = "", path: str = path) -> None:
            site = path + name
            if site in drawn:
                if not tensor.is_meta:
                    tensor.copy_(drawn[site])
            elif not only_frozen:
                draw(tensor, site, seed)

        adapter.start(fill)


def keep_entries(model: nn.Module, adapter_name: str, kept: Mapping[str, Tensor]) -> None:
    """Keep other entries of every sparse B, all of them zero.

    Args:
        model: The model with the adapter.
        adapter_name: The adapter.
        kept: Positions in each B of shape (out, rank), laid out row by row, by site.
    """
    for path, adapter in hosted(model, adapter_name):
        of_host = {site: kept[path + site] for site in adapter.sites() if path + site in kept}
        if of_host:
            adapter.keep(of_host)


def draw(tensor: Tensor, name: str, seed: int) -> None:
    """Fill one tensor from its own generator. The bound 1/sqrt(last dimension) is that of PEFT's initialisation.

    The values equal those of `uniform_` on a processor with fused multiply-add, which rounds once. The sum is exact in
    float64, so every processor rounds it to the same float32.

    Args:
        tensor: The tensor to fill; one on the meta device is left as it is.
        name: What the generator is named by: the site, and what follows it for further tensors.
        seed: The seed.
    """
    if tensor.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7]))
    bound = torch.tensor(1 / math.sqrt(tensor.shape[-1]), dtype=torch.float32).double()
    share = torch.rand(tensor.shape, generator=generator, dtype=torch.float32).double()
    tensor.copy_((2 * bound * share - bound).float())
