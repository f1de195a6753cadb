"""`marginal`: a budget spent rank by rank where the estimated benefit per unit of cost is highest."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from apportion.errors import ConfigurationError
from apportion.methods.base import AdapterSettings, Method
from apportion.methods.budget import spending, spent
from apportion.methods.gradient import sensitivity_shares
from apportion.records.options import MarginalOptions
from apportion.records.placement import Placement
from apportion.records.shapes import lora_shape

if TYPE_CHECKING:
    from apportion.records.profile import Profile


@dataclass(frozen=True)
class Offer:
    """What one matrix offers: the gain of its first rank, the price of every rank, and how many there are."""

    value: float
    price: float
    most: int


def place_marginal(profile: Profile, options: MarginalOptions, settings: AdapterSettings) -> list[Placement]:
    """Buy one rank of one matrix at a time, each time the one with the largest estimated gain per unit of cost.

    Experts, projections, attention, shared experts and layers compete with each other, and ranks with places. The
    estimated gain of a matrix's i-th rank is share ** sensitivity_power · i ** -rank_decay, with the share of the
    tasks' squared gradient norms that falls on the matrix. It falls with i, so that buying greedily is optimal up to
    what the last rank leaves over; buying goes on until nothing fits. Ties go to the earlier matrix.

    The scale alpha / rank is the plan's at every matrix, whatever its rank there: the estimate adds up ranks that learn
    at the same pace, and alpha over the matrix's own rank would slow down those of the matrices that were given most.

    Args:
        profile: Sensitivities of every task; counts too, where operations are counted.
        options: The budget, and the estimate's exponents.
        settings: The scale; the rank means nothing but the scale.

    Returns:
        One plain LoRA a matrix, of ranks of their own.

    Raises:
        ConfigurationError: no budget was given or it buys nothing, ranks of kinds were given, or a target was asked for
            whose gradient is not measured.
        ProfileError: sensitivity was not measured.

    Source: greedy marginal allocation for separable concave gains (Fox, 1966); sensitivity as LoRA-SMoE,
        arXiv:2505.06272.
    Differs: the estimate is ours, and was calibrated on measurements.
    """
    if options.budget is None:
        raise ConfigurationError(
            "marginal spends a budget, and none was given.",
            fix="give --budget: parameters (5000000) or operations a token (flops=80000)",
        )
    if options.ranks:
        raise ConfigurationError(
            f"a rank was given for {next(iter(options.ranks))}, and marginal chooses ranks itself.",
            fix="leave it out; --max-rank bounds them all",
        )
    shares = sensitivity_shares(profile, options)
    unit = options.budget.partition("=")[0]
    single = replace(settings, rank=1, alpha=settings.alpha / settings.rank)
    offers = []
    for site, share in shares.items():
        most = min(site.in_features, site.out_features)
        price = spending(unit, [single.place(site)], profile)
        offers.append(Offer(share**options.sensitivity_power, price, min(most, options.max_rank or most)))
    ranks = buy_ranks(offers, spent(options.budget, [], profile)[1], options.rank_decay)
    if not any(ranks):
        raise ConfigurationError(
            f"the budget {options.budget} is too small: the cheapest rank takes "
            f"{min(offer.price for offer in offers):,.10g}.",
            fix="give more, or other targets",
        )
    return [
        Placement(site.name, lora_shape(rank, single.alpha * rank, sparsity=single.sparsity))
        for site, rank in zip(shares, ranks, strict=True)
        if rank
    ]


def buy_ranks(offers: Sequence[Offer], budget: float, rank_decay: float) -> list[int]:
    """Spend a budget on the ranks with the largest gain per unit of cost.

    Args:
        offers: What can be bought; what costs nothing is not.
        budget: The most that may be spent.
        rank_decay: The i-th rank of an offer gains i ** -rank_decay of the first.

    Returns:
        The rank bought of each offer.

    Example:
        >>> buy_ranks([Offer(2.0, 1.0, 8), Offer(1.0, 1.0, 8)], 5.0, 0.5)
        [4, 1]
    """
    ranks = [0] * len(offers)
    heap = [(-offer.value / offer.price, place) for place, offer in enumerate(offers) if offer.price > 0]
    heapq.heapify(heap)
    while heap:
        _, place = heapq.heappop(heap)
        offer = offers[place]
        if offer.price > budget:
            continue
        budget -= offer.price
        ranks[place] += 1
        if ranks[place] < offer.most:
            gain = offer.value * (ranks[place] + 1) ** -rank_decay
            heapq.heappush(heap, (-gain / offer.price, place))
    return ranks


MARGINAL = Method(
    name="marginal",
    summary="a budget spent rank by rank where the estimated gain per unit of cost is highest",
    source="greedy marginal gain on a measured estimate",
    options=MarginalOptions,
    place=place_marginal,
    reads_tasks=True,
)
