"""Combine adapters into one, by concatenation (exact) or by a weighted sum of factors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from apportion.counting import count
from apportion.errors import ConfigurationError
from apportion.peft.site_factors import site_factors
from apportion.records.placement import Placement
from apportion.records.plan import PLAIN, Plan
from apportion.records.shapes.low_rank import LowRank
from apportion.records.site import Layout

Combination = Literal["cat", "linear"]
_LARGEST = 2.0**127  # close to the largest float32


def combined_plan(plans: Mapping[str, Plan], weights: Sequence[float], how: Combination, layout: Layout) -> Plan:
    """Return the plan of the combination of several adapters.

    Args:
        plans: The adapters' plans by name.
        weights: One weight per adapter.
        how: ``cat`` concatenates factors: ranks add up, and the result has the sites of all adapters. ``linear`` adds
            factors: all adapters must have the same sites and ranks.
        layout: The model's sites.

    Returns:
        A plan of plain factors at scale 1.

    Raises:
        ConfigurationError: the adapters cannot be combined in this way.
    """
    if len(plans) != len(weights) or not plans:
        raise ConfigurationError(f"{len(plans)} adapters and {len(weights)} weights were given.", fix="give one each")
    if not all(abs(weight) < _LARGEST for weight in weights):
        raise ConfigurationError(f"the weights {list(weights)} are not all finite in float32.", fix="give smaller ones")
    routed = [name for name, plan in plans.items() if not plan.is_mergeable]
    if routed:
        raise ConfigurationError(
            f"adapter {routed[0]!r} has gates that depend on the input, so it cannot be combined with others."
        )
    ranks = _combined_ranks(plans, how)
    first = next(iter(plans.values()))
    placements = tuple(Placement(site, LowRank(rank, float(rank))) for site, rank in ranks.items())
    flops = [plan.cost.adapter_flops_per_token for plan in plans.values()]
    counts = count(placements, layout.by_name)
    cost = replace(
        first.cost,
        trainable_parameters=counts.trained,
        stored_parameters=counts.stored(),
        stored_indices=counts.indices,
        frozen_parameters=counts.drawn,
        adapter_flops_per_token=flops[0] if how == "linear" else sum(flops),
        sites_by_kind=dict(Counter(layout.by_name[site].kind for site in ranks)),
    )
    options = {"adapters": list(plans), "weights": list(weights), "how": how}
    rank = max(ranks.values())
    return replace(
        first,
        method="combined",
        options=options,
        rank=rank,
        alpha=float(rank),
        cost=cost,
        placements=placements,
        procedure={"name": PLAIN},
        derived_from=tuple(plan.seal for plan in plans.values()),
    )


def _combined_ranks(plans: Mapping[str, Plan], how: Combination) -> dict[str, int]:
    """Return the combined adapter's rank at every site."""
    by_plan = {name: {p.site: p.shape.lora_rank or 0 for p in plan.placements} for name, plan in plans.items()}
    first_name, first = next(iter(by_plan.items()))
    if how == "cat":
        ranks: Counter[str] = Counter()
        for part in by_plan.values():
            ranks.update(part)
        return dict(ranks)
    if how != "linear":
        raise ConfigurationError(f"adapters cannot be combined by {how!r}.", fix="choose cat or linear")
    for name, part in by_plan.items():
        if part != first:
            raise ConfigurationError(
                f"adapter {name!r} has other sites or ranks than {first_name!r}, so factors cannot be added.",
                fix="combine by cat",
            )
    return first


@torch.no_grad()
def write_combined(
    model: nn.Module, plans: Mapping[str, Plan], weights: Sequence[float], how: Combination, adapter_name: str
) -> None:
    """Compute the factors of a combined adapter.

    Args:
        model: The model with all adapters, including the combined one.
        plans: The adapters' plans by name.
        weights: One weight per adapter.
        how: As `combined_plan` takes it.
        adapter_name: The combined adapter.

    Source: PEFT's `add_weighted_adapter`, ``cat`` and ``linear``.
    Differs: nothing; in ``cat``, weight and scale are applied to B.
    """
    sources = {name: {site: (a, b) for site, a, b in site_factors(model, name)} for name in plans}
    for site, a_RI, b_OR in site_factors(model, adapter_name):
        start = 0
        a_RI.zero_()
        b_OR.zero_()
        for (name, plan), weight in zip(plans.items(), weights, strict=True):
            if site not in sources[name]:
                continue
            a, b = sources[name][site]
            placement = plan.by_site[site]
            scaled = weight * placement.alpha / placement.rank
            if how == "cat":
                part = slice(start, start + len(a))
                a_RI[part] = a
                b_OR[:, part] = scaled * b
                start += len(a)
            else:
                a_RI.add_(a, alpha=math.copysign(math.sqrt(abs(scaled)), scaled))
                b_OR.add_(b, alpha=math.sqrt(abs(scaled)))
