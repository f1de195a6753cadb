"""Matrices chosen by gradient, and budgets spent rank by rank: never over, greedily optimal, in a fixed order."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import apportion
from apportion.discovery import find_sites
from apportion.errors import ConfigurationError, ProfileError
from apportion.methods.budget import flops_per_token
from apportion.methods.marginal import Offer, buy_ranks
from apportion.records.option_texts import parse_budget, parse_share
from apportion.records.plan import Plan
from apportion.records.profile import Profile
from apportion.records.site import Layout
from tiny_models import build_dense, build_tiny

LAYOUT = find_sites(build_tiny("olmoe"))
BUDGETS = st.builds("{}={}".format, st.sampled_from(["parameters", "flops"]), st.integers(400, 30_000))


def _profile(layout: Layout = LAYOUT, seed: int = 0, tasks: tuple[str, ...] = ("a", "b")) -> Profile:
    """Make up counts and gradients; as measured, bare routers have no gradient, nor has an expert without tokens."""
    generator = torch.Generator().manual_seed(seed)
    counts, sensitivity = {}, {}
    for task in tasks:
        width = max((block.num_experts for block in layout.blocks), default=0)
        counts[task] = torch.randint(0, 9, (len(layout.blocks), width), generator=generator)
        met = {b.layer: counts[task][row] for row, b in enumerate(layout.blocks)}
        sensitivity[task] = {
            site.name: 0.0 if site.expert is not None and not met[site.layer][site.expert] else float(value)
            for site, value in zip(layout.sites(), torch.rand(len(layout.by_name), generator=generator), strict=True)
            if site.storage != "weight"
        }
    mass = {task: count.double() for task, count in counts.items()}
    return Profile(layout, counts, mass, dict.fromkeys(tasks, 20), sensitivity)


def _taken(plan: Plan, profile: Profile) -> float:
    flops = plan.options["budget"].startswith("flops")
    return flops_per_token(plan.placements, profile) if flops else plan.cost.trainable_parameters


@settings(max_examples=60)
@given(budget=BUDGETS, seed=st.integers(0, 99), method=st.sampled_from(["marginal", "gradient"]))
def test_a_budget_is_spent_and_never_exceeded(budget: str, seed: int, method: str) -> None:
    profile = _profile(seed=seed)
    plan = apportion.plan(profile, method, rank=2, budget=budget)
    unit, _, allowed = budget.partition("=")
    assert _taken(plan, profile) <= int(allowed) + 1e-6
    left = int(allowed) - _taken(plan, profile)
    for site in LAYOUT.sites():
        share = sum(norms.get(site.name, 0) for norms in profile.sensitivity.values())
        rank = plan.by_site[site.name].rank if site.name in plan.by_site else 0
        full = rank == min(site.in_features, site.out_features) if method == "marginal" else rank > 0
        use = 1.0 if site.expert is None else profile.slots_per_token[site.layer, site.expert]
        price = site.num_parameters(1 if method == "marginal" else 2) * (2 * use if unit == "flops" else 1)
        assert full or not share or price > left - 1e-6, site.name
        assert share or not rank


@settings(max_examples=60)
@given(
    values=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    prices=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    most=st.integers(1, 4),
    decay=st.floats(0.1, 3),
    budget=st.integers(0, 20),
)
def test_buying_greedily_is_optimal_for_what_it_spends(
    values: list[int], prices: list[int], most: int, decay: float, budget: int
) -> None:
    offers = [Offer(float(value), float(price), most) for value, price in zip(values, prices, strict=False)]

    def gain(ranks: tuple[int, ...]) -> float:
        return sum(
            offer.value * sum(i**-decay for i in range(1, rank + 1)) for offer, rank in zip(offers, ranks, strict=True)
        )

    def price(ranks: tuple[int, ...]) -> float:
        return sum(offer.price * rank for offer, rank in zip(offers, ranks, strict=True))

    bought = tuple(buy_ranks(offers, budget, decay))
    assert price(bought) <= budget
    every = list(itertools.product(range(most + 1), repeat=len(offers)))
    best = max(gain(ranks) for ranks in every if price(ranks) <= budget)
    dearest = max(offer.price for offer in offers)
    if len({offer.price for offer in offers}) == 1:
        assert gain(bought) == pytest.approx(best)
    else:  # what the last item leaves over can be spent better, but no budget smaller by one item beats it
        smaller = max(gain(ranks) for ranks in every if price(ranks) <= max(budget - dearest, 0))
        assert gain(bought) >= smaller - 1e-9


def test_ranks_fall_with_sensitivity_and_rise_with_the_budget() -> None:
    offers = [Offer(value, 1.0, 16) for value in (8.0, 4.0, 4.0, 1.0)]
    before = [0] * 4
    for budget in range(1, 60):
        ranks = buy_ranks(offers, budget, 0.5)
        assert ranks == sorted(ranks, reverse=True)  # ties to the earlier
        assert sum(ranks) == budget
        assert all(new >= old for new, old in zip(ranks, before, strict=True))
        before = ranks


def test_what_costs_nothing_is_not_bought() -> None:
    assert buy_ranks([Offer(9.0, 0.0, 4), Offer(1.0, 1.0, 4)], 3, 0.5) == [0, 3]


@pytest.mark.parametrize("method", ["marginal", "gradient"])
def test_equal_profiles_give_equal_plans_and_tasks_count_the_same(method: str) -> None:
    profile = _profile()
    louder = {"a": profile.sensitivity["a"], "b": {name: 64 * v for name, v in profile.sensitivity["b"].items()}}
    scaled = Profile(LAYOUT, profile.counts, profile.routing_mass, profile.tokens, louder)
    plans = [apportion.plan(each, method, rank=2, budget=9000) for each in (profile, _profile(), scaled)]
    assert plans[0].as_dict() == plans[1].as_dict()
    assert plans[0].placements == plans[2].placements
    other = Profile(LAYOUT, profile.counts, profile.routing_mass, profile.tokens, {"a": louder["a"], "b": louder["a"]})
    assert apportion.plan(other, method, rank=2, budget=9000).placements != plans[0].placements


def test_equal_gradients_go_to_the_earlier_matrices() -> None:
    profile = _profile(build_dense_layout())
    even = {task: dict.fromkeys(norms, 1.0) for task, norms in profile.sensitivity.items()}
    tied = Profile(profile.layout, profile.counts, profile.routing_mass, profile.tokens, even)
    names = [site.name for site in profile.layout.sites()]
    assert [p.site for p in apportion.plan(tied, "gradient", rank=2, keep="40%").placements] == names[:6]
    first = [site.name for site in profile.layout.sites() if site.projection == "k"]
    spent = apportion.plan(tied, "marginal", rank=2, budget=48)  # k and v are the cheapest, at 48
    assert [(p.site, p.rank) for p in spent.placements] == [(first[0], 1)]


def build_dense_layout() -> Layout:
    """Give the layout of a model without experts."""
    return find_sites(build_dense())


def test_gradient_ranks_matrices_over_the_whole_model() -> None:
    profile = _profile(tasks=("a",))
    norms = profile.sensitivity["a"]
    sizes = {site.name: site.in_features * site.out_features for site in LAYOUT.sites()}
    met = [name for name in norms if norms[name] > 0]
    for per, key in (("matrix", lambda name: norms[name]), ("parameter", lambda name: norms[name] / sizes[name])):
        plan = apportion.plan(profile, "gradient", rank=2, keep=0.25, per=per)
        assert set(plan.by_site) == set(sorted(met, key=key, reverse=True)[: -(-len(met) // 4)])
    plans = [apportion.plan(profile, "gradient", rank=2, per=per).placements for per in ("matrix", "parameter")]
    assert plans[0] != plans[1]


def test_sensitivity_times_count_ranks_experts() -> None:
    profile = _profile()
    heat = profile.expert_sensitivity() * profile.total_counts()
    plan = apportion.plan(profile, "hellora", rank=2, hot=3, criterion="sensitivity_count")
    assert list(plan.experts_by_layer().values()) == [sorted(row.topk(3).indices.tolist()) for row in heat]


def test_ranks_are_attached_as_planned_at_one_scale(tmp_path: Any) -> None:
    model = build_tiny("olmoe")
    plan = apportion.plan(_profile(), "marginal", rank=4, alpha=12, budget=20_000)
    ranks = {placement.rank for placement in plan.placements}
    assert len(ranks) > 4
    assert {p.alpha / p.rank for p in plan.placements} == {3.0}
    adapted = apportion.apply(copy.deepcopy(model), plan)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trainable == plan.cost.trainable_parameters <= 20_000
    plan.save(tmp_path / "plan.json")
    assert apportion.load_plan(tmp_path / "plan.json") == plan
    assert len(plan.as_dict()["placements"]) == len(ranks)  # one group a rank


def test_the_largest_rank_is_kept() -> None:
    plan = apportion.plan(_profile(), "marginal", budget=20_000, max_rank=3)
    assert max(placement.rank for placement in plan.placements) == 3
    everything = apportion.plan(_profile(build_dense_layout()), "marginal", budget=10**7)
    sites = everything.by_site
    assert all(sites[s.name].rank == min(s.in_features, s.out_features) for s in build_dense_layout().sites())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("marginal", {}, "method marginal needs a budget"),
        ("marginal", {"budget": "experts=4"}, "counts LoRA experts"),
        ("marginal", {"budget": 47}, "budget parameters=47 is too small: the cheapest rank costs 48"),
        ("marginal", {"budget": "flops=1"}, "too small"),
        ("marginal", {"budget": 9000, "ranks": {"experts": 2}}, "chooses ranks itself"),
        ("marginal", {"budget": 9000, "targets": "router"}, "is not measured"),
        ("marginal", {"budget": 9000, "max_rank": 0}, "max_rank"),
        ("marginal", {"budget": 9000, "rank_decay": 0}, "rank_decay"),
        ("gradient", {"budget": 9000, "keep": 0.5}, "both given"),
        ("gradient", {"budget": 95}, "the cheapest matrix costs 96"),
        ("gradient", {"keep": "0%"}, "keep"),
        ("gradient", {"keep": "a%"}, "keep"),
        ("gradient", {"per": "layer"}, "per"),
    ],
)
def test_wrong_options_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        apportion.plan(_profile(), method, rank=2, **options)


@pytest.mark.parametrize("options", [{"method": "marginal", "budget": 9000}, {"method": "gradient"}])
def test_a_profile_without_sensitivity_is_refused(tokens: Tensor, tiny_model: nn.Module, options: Any) -> None:
    profile = apportion.profile(tiny_model, [{"input_ids": tokens}])
    with pytest.raises(ProfileError, match="profile with --sensitivity"):
        apportion.plan(profile, rank=2, **options)


def test_budgets_and_shares_are_read() -> None:
    assert parse_budget("flops=80_000") == "flops=80000"
    assert [parse_share(value) for value in ("25%", " 2.5% ", 0.25, "0.25")] == [0.25, 0.025, 0.25, "0.25"]
