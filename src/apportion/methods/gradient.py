"""`gradient`: the single matrices, of any kind and layer, that the tasks' gradients need most."""

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
    """Adapt the matrices with the largest gradients, ranked over all kinds, projections and layers at once.

    Every task counts the same: its norms are taken as shares of their sum. Ties go to the earlier matrix. A budget is
    spent down the ranking; a matrix that does not fit any more is passed over.

    Args:
        profile: Sensitivities of every task.
        options: The share or the budget, and what is compared.
        settings: Rank and scale of every adapter.

    Returns:
        One plain LoRA a matrix.

    Raises:
        ConfigurationError: the budget buys nothing, or a target was asked for whose gradient is not measured.
        ProfileError: sensitivity was not measured.

    Source: LoRA-SMoE, arXiv:2505.06272, for the quantity; ranking single matrices over the whole model is ours.
    Differs: no votes and no groups; a norm a parameter is an addition.
    """
    shares = sensitivity_shares(profile, options)
    sizes = {site: site.in_features * site.out_features if options.per == "parameter" else 1 for site in shares}
    ranked = sorted(shares, key=lambda site: -shares[site] / sizes[site])
    if options.budget is None:
        kept = ranked[: math.ceil(round(options.keep * len(ranked), 9))]
    else:
        kept = _affordable(options.budget, ranked, profile, settings)
    chosen = set(kept)
    return [settings.place(site) for site in shares if site in chosen]


def sensitivity_shares(profile: Profile, options: MethodOptions) -> dict[Site, float]:
    """Give the share of the tasks' squared gradient norms that falls on each targeted matrix.

    Every task counts the same, whatever the number of its rows or the size of its loss: its norms are divided by their
    sum over the whole model, and the tasks' shares are averaged.

    Args:
        profile: Sensitivities of every task.
        options: For the targets. A bare weight (most routers) has no measured gradient: it is left out, unless it was
            asked for by name.

    Returns:
        Shares of matrices with a gradient, in the layout's order.

    Raises:
        ConfigurationError: a target was asked for whose gradient is not measured.
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
                f"the sensitivity of {site.name} is not measured: it is no linear layer.",
                details={"model": profile.layout.describe()},
                fix=f"leave {site.kind} out of the targets",
            )
    shares = {site: share for site, share in shares.items() if share > 0}
    if not shares:
        raise ProfileError(
            "no targeted matrix has a gradient in this profile.", fix="choose other targets, or profile other data"
        )
    return shares


def _affordable(budget: str, ranked: list[Site], profile: Profile, settings: AdapterSettings) -> list[Site]:
    """Go down the ranking and take each matrix that still fits."""
    unit = budget.partition("=")[0]
    left = float(spent(budget, [], profile)[1])
    kept, least = [], math.inf
    for site in ranked:
        price = spending(unit, [settings.place(site)], profile)
        least = min(least, price)
        if price <= left:
            kept.append(site)
            left -= price
    if not kept:
        raise ConfigurationError(
            f"the budget {budget} is too small: the cheapest matrix takes {least:,.10g}.",
            fix="give more, a lower rank, or other targets",
        )
    return kept


GRADIENT = Method(
    name="gradient",
    summary="LoRA on the matrices with the largest gradients, ranked over the whole model",
    source="LoRA-SMoE's sensitivity, arXiv:2505.06272",
    options=GradientOptions,
    place=place_gradient,
    reads_tasks=True,
)
