"""`gradient`: adapt the matrices with the largest gradients, of any kind and layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from apportion.errors import ConfigurationError, ProfileError
from apportion.methods.base import AdapterSettings, Method
from apportion.methods.budget import spending, spent
from apportion.methods.targets import targeted_sites
from apportion.records.options import GradientOptions, MethodOptions
from apportion.records.placement import Placement
from apportion.records.site import Site

if TYPE_CHECKING:
    from apportion.records.profile import Profile


def place_gradient(profile: Profile, options: GradientOptions, settings: AdapterSettings) -> list[Placement]:
    """Adapt the matrices with the largest gradients, ranked over the whole model.

    Tasks have equal weight: each task's norms are divided by their sum. Ties go to the earlier matrix. With a budget,
    matrices are taken in order of rank, and those that no longer fit are skipped.

    Args:
        profile: Sensitivities of every task.
        options: The share or the budget, and the quantity to rank by.
        settings: Rank and scale of every adapter.

    Returns:
        One LoRA per matrix.

    Raises:
        ConfigurationError: the budget is too small, or the gradient of a given target was not measured.
        ProfileError: sensitivity was not measured.

    Source: LoRA-SMoE, arXiv:2505.06272, for the quantity; ranking single matrices over the whole model is ours.
    Differs: no votes and no groups; norms per parameter are an addition.
    """
    shares = sensitivity_shares(profile, options)
    sizes = {site: site.in_features * site.out_features if options.per == "parameter" else 1 for site in shares}
    ranked = sorted(shares, key=lambda site: -shares[site] / sizes[site])
    if options.budget is None:
        chosen = set(ranked[: math.ceil(round(options.keep * len(ranked), 9))])
    else:
        chosen = set(_affordable(options.budget, ranked, profile, settings))
    return [settings.place(site) for site in shares if site in chosen]


def sensitivity_shares(profile: Profile, options: MethodOptions) -> dict[Site, float]:
    """Return each targeted matrix's share of the squared gradient norms.

    Tasks have equal weight, whatever their number of rows or loss: each task's norms are divided by their sum over the
    whole model, and the shares are averaged over tasks.

    Args:
        profile: Sensitivities of every task.
        options: Options with the targets. Bare weights (most routers) have no measured gradient. They are skipped by
            default and refused if given as targets.

    Returns:
        Shares of the matrices with a nonzero gradient, in the layout's order.

    Raises:
        ConfigurationError: the gradient of a given target was not measured.
        ProfileError: sensitivity was not measured, or no targeted matrix has a gradient.
    """
    tasks = profile.measured_sensitivity().values()
    totals = [sum(norms.values()) for norms in tasks]
    by_name = "targets" in options.given
    shares: dict[Site, float] = {}
    for site in targeted_sites(options, profile.layout):
        if all(site.name in norms for norms in tasks):
            parts = (norms[site.name] / total for norms, total in zip(tasks, totals, strict=True))
            shares[site] = sum(parts) / len(totals)
        elif by_name:
            raise ConfigurationError(
                f"the sensitivity of {site.name} is not measured: it is not a linear layer.",
                details={"model": profile.layout.describe()},
                fix=f"remove {site.kind} from the targets",
            )
    shares = {site: share for site, share in shares.items() if share > 0}
    if not shares:
        raise ProfileError(
            "no targeted matrix has a gradient in this profile.", fix="choose other targets, or profile on other data"
        )
    return shares


def _affordable(budget: str, ranked: list[Site], profile: Profile, settings: AdapterSettings) -> list[Site]:
    """Take the matrices that fit the budget, in order of rank."""
    unit = budget.partition("=")[0]
    left = float(spent(budget, [], profile)[1])
    chosen, cheapest = [], math.inf
    for site in ranked:
        price = spending(unit, [settings.place(site)], profile)
        cheapest = min(cheapest, price)
        if price <= left:
            chosen.append(site)
            left -= price
    if not chosen:
        raise ConfigurationError(
            f"the budget {budget} is too small: the cheapest matrix costs {cheapest:,.10g}.",
            fix="give a larger budget, a lower rank, or other targets",
        )
    return chosen


GRADIENT = Method(
    name="gradient",
    summary="LoRA on the matrices with the largest gradients, ranked over the whole model",
    source="LoRA-SMoE's sensitivity, arXiv:2505.06272",
    options=GradientOptions,
    place=place_gradient,
    reads_tasks=True,
)
