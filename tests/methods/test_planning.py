"""Methods: which experts they choose, what that costs, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import apportion
from apportion.discovery import find_sites
from apportion.errors import ConfigurationError, ProfileError
from apportion.methods.hot import coldest, drawn, experts_kept, hottest
from apportion.methods.planning import even_profile
from apportion.records.option_texts import parse_hot
from apportion.records.profile import Profile
from apportion.records.site import Layout
from tiny_models import build_dense, build_tiny

ProfileOf = Callable[[nn.Module], Profile]

COUNTS = [[9, 5, 1, 3, 0, 2, 9, 1], [1, 1, 1, 1, 1, 1, 1, 1]]


@pytest.fixture
def layout(tiny_model: nn.Module) -> Layout:
    return find_sites(tiny_model)


def _profile(layout: Layout, counts: list[list[int]], mass: list[list[float]] | None = None) -> Profile:
    counted = torch.tensor(counts)
    weights = counted.double() if mass is None else torch.tensor(mass, dtype=torch.float64)
    return Profile(layout, {"t": counted}, {"t": weights}, {"t": 15})


def _experts(profile: Profile, method: str, **options: Any) -> list[list[int]]:
    return list(apportion.plan(profile, method, rank=4, **options).experts_by_layer().values())


def test_the_hottest_are_kept_and_ties_go_to_the_lower_id(layout: Layout) -> None:
    assert _experts(_profile(layout, COUNTS), "hellora", hot=3) == [[0, 1, 6], [0, 1, 2]]


def test_the_coldest_are_the_opposite(layout: Layout) -> None:
    assert _experts(_profile(layout, COUNTS), "cold", hot=3) == [[2, 4, 7], [0, 1, 2]]


def test_percentages_round_up(layout: Layout) -> None:
    assert [len(ids) for ids in _experts(_profile(layout, COUNTS), "hellora", hot="30%")] == [3, 3]
    assert [len(ids) for ids in _experts(_profile(layout, COUNTS), "hellora", hot="25%")] == [2, 2]


def test_coverage_keeps_the_fewest_that_reach_it(layout: Layout) -> None:
    assert _experts(_profile(layout, COUNTS), "hellora", hot="coverage=0.6") == [[0, 6], [0, 1, 2, 3, 4]]
    assert [len(ids) for ids in _experts(_profile(layout, COUNTS), "hellora", hot="coverage=1")] == [7, 8]


def test_mass_ranks_by_weight(layout: Layout) -> None:
    mass = [[0.1, 0.2, 0.3, 0.9, 0, 0, 0.1, 0], [0, 0, 0, 0, 0, 0, 1, 2]]
    assert _experts(_profile(layout, COUNTS, mass), "hellora", hot=2, criterion="mass") == [[2, 3], [6, 7]]


def test_random_draws_depend_on_the_seed_alone(layout: Layout) -> None:
    profile = _profile(layout, COUNTS)
    other = _profile(layout, [COUNTS[1], COUNTS[0]])
    draws = [_experts(profile, "random", hot=3, seed=seed) for seed in range(8)]
    assert draws == [_experts(other, "random", hot=3, seed=seed) for seed in range(8)]
    assert len({str(draw) for draw in draws}) > 1
    assert all(len(ids) == 3 for draw in draws for ids in draw)


def test_controls_cost_what_hellora_costs(layout: Layout) -> None:
    profile = _profile(layout, COUNTS)
    costs = {method: apportion.plan(profile, method, hot=3, rank=4).cost for method in ("hellora", "random", "cold")}
    assert len({cost.trainable_parameters for cost in costs.values()}) == 1
    assert costs["cold"].adapter_flops_per_token < costs["hellora"].adapter_flops_per_token


def test_everything_but_routed_experts_is_adapted_whole(profile_of: ProfileOf) -> None:
    model = build_tiny("deepseek_v3")
    plan = apportion.plan(profile_of(model), "hellora", hot=2, rank=4)
    assert plan.cost.sites_by_kind == {"attention": 15, "dense": 3, "router": 2, "shared": 6, "experts": 12}


def test_targets_narrow_the_choice(layout: Layout) -> None:
    profile = _profile(layout, COUNTS)
    plan = apportion.plan(profile, "hellora", hot=2, rank=4, targets="attention.q,experts.down")
    assert plan.cost.sites_by_kind == {"attention": 2, "experts": 4}
    assert {placement.site.rpartition(".")[2] for placement in plan.placements} == {"q_proj", "down_proj"}


def test_layers_narrow_the_choice(layout: Layout) -> None:
    plan = apportion.plan(_profile(layout, COUNTS), "hellora", hot=2, rank=4, layers="1")
    assert list(plan.experts_by_layer()) == ["model.layers.1.mlp.experts"]
    assert all(".layers.1." in placement.site for placement in plan.placements)
    whole = apportion.plan(_profile(layout, COUNTS), "hellora", hot=2, rank=4, layers="0-1")
    assert whole.placements == apportion.plan(_profile(layout, COUNTS), "hellora", hot=2, rank=4).placements


def test_kinds_have_ranks_of_their_own(layout: Layout) -> None:
    ranks = {"router": 2, "experts": 8}
    plan = apportion.plan(_profile(layout, COUNTS), "hellora", hot=2, rank=4, alpha=4, ranks=ranks)
    found = {site.kind: (p.rank, p.alpha) for p in plan.placements for site in [layout.by_name[p.site]]}
    assert found == {"attention": (4, 4.0), "router": (2, 2.0), "experts": (8, 8.0)}


def test_costs_are_sums_over_sites(layout: Layout) -> None:
    profile = _profile(layout, COUNTS)
    cost = apportion.plan(profile, "hellora", hot=2, rank=4).cost
    attention = 2 * (2 * (32 + 32) + 2 * (32 + 16)) * 4
    router = 2 * (32 + 8) * 4
    expert = 3 * (32 + 16) * 4
    assert cost.trainable_parameters == attention + router + 2 * 2 * expert
    assert cost.lora_parameters == attention + router + 2 * 8 * expert
    assert cost.adapter_flops_per_token == pytest.approx(2 * (attention + router) + 2 * expert * (18 / 15 + 2 / 15))
    assert cost.checkpoint_bytes == 4 * cost.trainable_parameters
    assert cost.optimizer_bytes == 8 * cost.trainable_parameters
    assert cost.lora_count_ratio == cost.trainable_parameters / cost.lora_parameters
    own = cost.trainable_parameters / (cost.base_parameters + cost.trainable_parameters)
    whole = cost.lora_parameters / (cost.base_parameters + cost.lora_parameters)
    assert cost.lora_percentage_ratio == pytest.approx(own / whole)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.data())
def test_hottest_and_coldest_are_extremes(counts: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(counts)))
    heat = np.array(counts, dtype=np.float64)
    kept, rest = hottest(heat, k), set(range(len(counts)))
    assert len(kept) == k
    assert all((counts[inside], -inside) > (counts[out], -out) for inside in kept for out in rest - set(kept))
    cold = coldest(heat, k)
    assert all((counts[inside], inside) < (counts[out], out) for inside in cold for out in rest - set(cold))
    assert len(set(drawn(len(counts), k, "seed"))) == k


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any), st.floats(0.01, 1))
def test_coverage_is_reached_and_not_exceeded(counts: list[int], share: float) -> None:
    heat = np.array(counts, dtype=np.float64)
    k = experts_kept(heat, f"coverage={share:.4f}")
    wanted = float(f"{share:.4f}") * sum(counts)
    ordered = sorted(counts, reverse=True)
    assert sum(ordered[:k]) >= wanted - 1e-6
    assert k == 1 or sum(ordered[: k - 1]) < wanted + 1e-6


@pytest.mark.parametrize(
    ("hot", "message"),
    [
        (0, "keeps no experts"),
        (-2, "keeps no experts"),
        (9, "more experts than a layer has"),
        ("120%", "out of range"),
        ("0%", "out of range"),
        ("coverage=1.5", "out of range"),
        ("coverage=nan", "out of range"),
        ("many", "is not understood"),
        ("2.5", "is not understood"),
    ],
)
def test_wrong_numbers_of_hot_experts(layout: Layout, hot: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        apportion.plan(_profile(layout, COUNTS), "hellora", hot=hot, rank=4)


def test_hot_is_read_in_three_forms() -> None:
    assert [parse_hot(value) for value in (8, "8", " 25% ", "Coverage=0.60")] == [8, 8, "25%", "coverage=0.6"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "helora"}, "did you mean hellora"),
        ({"colour": 1}, "no option 'colour'"),
        ({"criterion": "luck"}, "option criterion"),
        ({"targets": "atention"}, "did you mean attention"),
        ({"targets": "shared"}, "no site for the target 'shared'"),
        ({"targets": "experts.sideways"}, "no site for the target 'experts.sideways'"),
        ({"targets": "attention"}, "do not include the routed experts"),
        ({"targets": ""}, "no targets"),
        ({"layers": "0-2"}, "layer 2, which this model does not have"),
        ({"layers": "1-0"}, "not understood"),
        ({"layers": "all"}, "not understood"),
        ({"ranks": {"routers": 2}}, "'routers', which is not a kind"),
        ({"ranks": {"router": 0}}, "not a rank"),
        ({"ranks": {"shared": 2}}, "no site of this kind is adapted"),
        ({"rank": 0}, "not a rank"),
        ({"rank": 17}, "rank 17 is too large"),
        ({"alpha": 0}, "is not a positive number"),
        ({"alpha": float("inf")}, "float32 cannot hold"),
        ({"alpha": float("nan")}, "is not a positive number"),
        ({"alpha": 1e300}, "float32 cannot hold"),
        ({"alpha": 10**400}, "float32 cannot hold"),
        ({"alpha": 1e-60}, "float32 cannot hold"),
        ({"alpha": "8"}, "is not a positive number"),
        ({"rank": "4"}, "rank='4' is not a rank"),
    ],
)
def test_wrong_arguments(layout: Layout, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        apportion.plan(_profile(layout, COUNTS), **{"method": "hellora", "rank": 4, "hot": 2, **arguments})


@pytest.mark.parametrize("method", ["hellora", "random", "cold"])
def test_a_dense_model_has_no_hot_experts(method: str, tokens: Tensor, profile_of: ProfileOf) -> None:
    with pytest.raises(ConfigurationError, match="is a dense model"):
        apportion.plan(profile_of(build_dense()), method, rank=4)


@pytest.mark.parametrize("criterion", ["count", "mass"])
def test_an_empty_layer_is_named(layout: Layout, criterion: str) -> None:
    profile = _profile(layout, [COUNTS[0], [0] * 8])
    with pytest.raises(ProfileError, match="layer 1 has no routed token"):
        apportion.plan(profile, "hellora", hot=2, rank=4, criterion=criterion)


def test_a_router_may_have_a_rank_above_its_rows(layout: Layout) -> None:
    plan = apportion.plan(_profile(layout, COUNTS), "hellora", hot=2, rank=16)
    assert plan.by_site["model.layers.0.mlp.gate"].rank == 16


def test_even_profiles_send_top_k_slots_a_token(any_model: nn.Module) -> None:
    profile = even_profile(find_sites(any_model))
    assert (profile.total_counts().sum(1) / profile.total_tokens()).tolist() == [2.0] * len(profile.layers)
