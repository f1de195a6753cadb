"""Masks of the entries of B to keep: the largest ones of a trained adapter, or random ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from peft import PeftModel
from torch import Tensor

from apportion.counting import num_kept
from apportion.discovery import find_sites
from apportion.errors import ConfigurationError
from apportion.peft.site_factors import site_factors
from apportion.records.mask import Mask, b_shapes
from apportion.records.options import Granularity
from apportion.records.placement import Placement
from apportion.records.plan import Plan
from apportion.records.site import Site


@torch.no_grad()
def extract_mask(model: PeftModel, adapter_name: str, plan: Plan, granularity: Granularity = "global") -> Mask:
    """Select the entries of B with the largest magnitude, as many as a sparse plan counts.

    With ``global``, one threshold holds for all sites. Otherwise each layer, site or projection type keeps its share.
    Ties go to the earlier entry.

    Args:
        model: A model whose adapter trained all of B.
        adapter_name: The adapter.
        plan: The sparse plan.
        granularity: Group of sites within which entries are ranked.

    Returns:
        The mask, with the checksum of the adapter's A.

    Raises:
        ConfigurationError: B is zero.

    Source: LoRI, arXiv:2504.07448, calibration of the mask.
    Differs: nothing; the other granularities are its ablations.
    """
    sites = find_sites(model).by_name
    matrices = {site: b_OR.cpu() for site, _, b_OR in site_factors(model, adapter_name)}
    shapes = b_shapes(plan.placements, sites)
    if not any(bool(matrices[site].any()) for site in shapes):
        raise ConfigurationError("no mask can be extracted: B is zero.", fix="train the adapter first")
    indices: dict[str, Tensor] = {}
    for sparsity in sorted({p.sparsity for p in plan.placements if p.sparsity}):
        groups: dict[str, list[str]] = {}
        for placement in plan.placements:
            if placement.sparsity == sparsity:
                groups.setdefault(_group(sites[placement.site], granularity), []).append(placement.site)
        sizes = [sum(matrices[name].numel() for name in names) for names in groups.values()]
        total, seen, given = num_kept(sum(sizes), 1 - sparsity), 0, 0
        for names, size in zip(groups.values(), sizes, strict=True):
            seen += size
            count = total * seen // sum(sizes) - given
            given += count
            indices |= _largest({name: matrices[name] for name in names}, count)
    facts = {"made": "by magnitude", "granularity": granularity}
    checksum = model.peft_config[adapter_name].a_checksum
    return Mask({site: indices[site] for site in shapes}, shapes, checksum, facts)


def random_mask(placements: Iterable[Placement], sites: Mapping[str, Site], seed: int) -> Mask:
    """Draw kept entries at random, as a control for an extracted mask.

    Args:
        placements: The plan's placements.
        sites: The model's sites by name.
        seed: Seed of the draw.

    Returns:
        A mask with as many kept entries as the plan counts, distributed over the sites in proportion to their size.
    """
    sparse = [placement for placement in placements if placement.sparsity]
    shapes = b_shapes(sparse, sites)
    indices: dict[str, Tensor] = {}
    for sparsity in sorted({placement.sparsity for placement in sparse}):
        group = [placement for placement in sparse if placement.sparsity == sparsity]
        sizes = [placement.total_rank * sites[placement.site].out_features for placement in group]
        total, seen, given = num_kept(sum(sizes), 1 - sparsity), 0, 0
        for placement, size in zip(group, sizes, strict=True):
            seen += size
            count = total * seen // sum(sizes) - given
            given += count
            name = hashlib.sha256(f"{seed}/mask/{placement.site}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(name[:7]))
            drawn = torch.randperm(size, generator=generator)[:count]
            indices[placement.site] = drawn.sort().values.to(torch.int32)
    ordered = {site: indices[site] for site in shapes}
    return Mask(ordered, shapes, provenance={"made": "at random", "seed": seed})


def _group(site: Site, granularity: Granularity) -> str:
    """Return the name of the group that a site's entries are ranked in."""
    kinds = {"global": "", "layer": str(site.layer), "site": site.name, "projection": f"{site.kind}.{site.projection}"}
    return kinds[granularity]


def _largest(matrices: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return the positions of the largest entries over several matrices."""
    sizes = {name: matrix.abs().reshape(-1) for name, matrix in matrices.items()}
    flat = torch.cat(list(sizes.values())).float()
    keep = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    if count:
        threshold = flat.kthvalue(len(flat) - count + 1).values
        keep = flat > threshold
        ties = (flat == threshold).nonzero().squeeze(1)[: count - int(keep.sum())]
        keep[ties] = True
    parts = torch.split(keep, [len(values) for values in sizes.values()])
    return {name: part.nonzero().squeeze(1).to(torch.int32).cpu() for name, part in zip(sizes, parts, strict=True)}
