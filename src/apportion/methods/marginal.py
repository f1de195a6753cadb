"""`marginal`: spend a budget one rank at a time, at the highest estimated gain per unit of cost."""

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
from apportion.records.shapes.registry import lora_shape

if TYPE_CHECKING:
    from apportion.records.profile import Profile


@dataclass(frozen=True)
class Offer:
    """One matrix that ranks can be bought for.

    Args:
        value: Estimated gain of the first rank.
        price: Cost of each rank.
        max_rank: Largest rank.
    """

    value: float
    price: float
    max_rank: int


def place_marginal(profile: Profile, options: MarginalOptions, settings: AdapterSettings) -> list[Placement]:
    """Repeatedly buy one rank of the matrix with the largest estimated gain per unit of cost.

    All targeted matrices compete with each other. The estimated gain of a matrix's i-th rank is
    share ** sensitivity_power · i ** -rank_decay, where share is the matrix's share of the tasks' squared gradient
    norms. The gain falls with i, so greedy buying is optimal up to the unspent rest of the budget. It stops when
    nothing fits. Ties go to the earlier matrix.

    The scale alpha / rank is the same for every matrix, whatever its rank. The estimate assumes that all ranks learn at
    the same pace; alpha divided by the matrix's rank would slow down matrices of high rank.

    Args:
        profile: Sensitivities of every task; also counts, for budgets in operations.
        options: The budget, and the exponents of the estimate.
        settings: Alpha and rank; only their ratio, the scale, is used.

    Returns:
        One LoRA per matrix, with different ranks.

    Raises:
        ConfigurationError: no budget was given or it is too small, ranks by kind were given, or the gradient of a given
            target was not measured.
        ProfileError: sensitivity was not measured.

    Source: greedy marginal allocation for separable concave gains (Fox, 1966); sensitivity as LoRA-SMoE,
        arXiv:2505.06272.
    Differs: the estimate is ours, calibrated on measurements.
    """
    if options.budget is None:
        raise ConfigurationError(
            "the method marginal needs a budget.",
            fix="give --budget: parameters (5000000) or operations per token (flops=80000)",
        )
    if options.ranks:
        raise ConfigurationError(
            f"a rank was given for {next(iter(options.ranks))}, but marginal chooses ranks itself.",
            fix="drop it, or limit all ranks with --max-rank",
        )
    shares = sensitivity_shares(profile, options)
    unit = options.budget.partition("=")[0]
    single = replace(settings, rank=1, alpha=settings.alpha / settings.rank)
    offers = []
    for site, share in shares.items():
        max_rank = min(site.in_features, site.out_features)
        price = spending(unit, [single.place(site)], profile)
        offers.append(Offer(share**options.sensitivity_power, price, min(max_rank, options.max_rank or max_rank)))
    ranks = buy_ranks(offers, spent(options.budget, [], profile)[1], options.rank_decay)
    if not any(ranks):
        raise ConfigurationError(
            f"the budget {options.budget} is too small: the cheapest rank costs "
            f"{min(offer.price for offer in offers):,.10g}.",
            fix="give a larger budget, or other targets",
        )
    return [
        Placement(site.name, lora_shape(rank, single.alpha * rank, sparsity=single.sparsity))
        for site, rank in zip(shares, ranks, strict=True)
        if rank
    ]


def buy_ranks(offers: Sequence[Offer], budget: float, rank_decay: float) -> list[int]:
    """Spend a budget on the ranks with the largest gain per unit of cost.

    Args:
        offers: The matrices. Those with a price of 0 are skipped.
        budget: Maximum total cost.
        rank_decay: The i-th rank gains i ** -rank_decay times the first.

    Returns:
        The rank of each matrix.

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
        if ranks[place] < offer.max_rank:
            gain = offer.value * (ranks[place] + 1) ** -rank_decay
            heapq.heappush(heap, (-gain / offer.price, place))
    return ranks


MARGINAL = Method(
    name="marginal",
    summary="spend a budget one rank at a time, at the highest estimated gain per unit of cost",
    source="greedy marginal gain on a measured estimate",
    options=MarginalOptions,
    place=place_marginal,
    reads_tasks=True,
)
