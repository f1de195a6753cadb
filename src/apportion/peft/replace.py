"""Replace an adapter by one with other ranks or sites, as a procedure leaves it after training."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import Tensor

from apportion.discovery import find_sites
from apportion.errors import ConfigurationError
from apportion.peft.attach import receipt_of
from apportion.peft.site_factors import site_factors
from apportion.records.plan import Plan
from apportion.records.shapes.low_rank import LowRank


@torch.no_grad()
def replace_adapter(
    model: PeftModel, adapter_name: str, plan: Plan, factors: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Replace an adapter by one with another plan, under the same name and with given factors.

    The new parameters are in no optimizer, so this is for the end of training.

    Args:
        model: The model with the adapter.
        adapter_name: The adapter.
        plan: The new plan, of plain low-rank shapes.
        factors: For every site of the plan, A of shape (rank, in) and B of shape (out, rank). They may be views of the
            old adapter's factors.

    Raises:
        ConfigurationError: the plan has other shapes, or factors of a site are missing or have another shape.
    """
    sites = find_sites(model).by_name
    for placement in plan.placements:
        if not isinstance(placement.shape, LowRank):
            raise ConfigurationError(
                "an adapter can only be replaced by plain low-rank factors.",
                place=placement.site,
                found=placement.shape.kind,
            )
        site, rank = sites[placement.site], placement.rank
        shapes = [tuple(factor.shape) for factor in factors.get(placement.site, ())]
        if shapes != [(rank, site.in_features), (site.out_features, rank)]:
            raise ConfigurationError(
                f"the factors of {placement.site} do not have the planned shapes.",
                found=str(shapes),
                expected=str([(rank, site.in_features), (site.out_features, rank)]),
            )
    values = {placement.site: [part.clone() for part in factors[placement.site]] for placement in plan.placements}
    config = copy.copy(model.peft_config[adapter_name])
    config.plan, config.r, config.lora_alpha, config.a_checksum = plan, plan.rank, plan.alpha, None
    config.store_a = config.dense_b = False
    model.delete_adapter(adapter_name)
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(adapter_name, config)
    model.set_adapter(adapter_name)
    for site_name, a_RI, b_OR in site_factors(model, adapter_name):
        a_RI.copy_(values[site_name][0])
        b_OR.copy_(values[site_name][1])
    model.receipt = receipt_of(model, find_sites(model), plan, adapter_name)
