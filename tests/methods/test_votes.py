"""Votes and numbers of LoRA experts: budgets are exact, and nothing else decides than what should."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import apportion
from apportion.discovery import find_sites
from apportion.errors import ApportionWarning, ConfigurationError, PlanError, ProfileError
from apportion.methods.lora_smoe import num_voted
from apportion.methods.mola import spread
from apportion.records.option_texts import parse_budget
from apportion.records.profile import Profile
from apportion.records.shapes import lora_shape
from apportion.records.site import Layout, Site
from tiny_models import build_dense, build_tiny

_WIDTHS = {
    "q": (32, 32),
    "k": (32, 16),
    "v": (32, 16),
    "o": (32, 32),
    "gate": (32, 64),
    "up": (32, 64),
    "down": (64, 32),
}


def _dense_layout(num_layers: int, projections: tuple[str, ...] = tuple(_WIDTHS)) -> Layout:
    sites = [
        Site(
            f"model.layers.{layer}.{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj",
            "attention" if name in "qkvo" else "dense",
            layer,
            name,
            *_WIDTHS[name],
        )
        for layer in range(num_layers)
        for name in projections
    ]
    return Layout("Test", "test", 10_000, "f" * 64, tuple(sites))


def _profile(layout: Layout, num_tasks: int, seed: int = 0) -> Profile:
    generator = random.Random(seed)
    empty = torch.zeros(0, 0, dtype=torch.int64)
    tasks = [f"t{number}" for number in range(num_tasks)]
    norms = {task: {site.name: generator.expovariate(1.0) for site in layout.sites()} for task in tasks}
    return Profile(
        layout, dict.fromkeys(tasks, empty), dict.fromkeys(tasks, empty.double()), dict.fromkeys(tasks, 100), norms
    )


def test_the_published_plan_has_688_experts() -> None:
    layout = _dense_layout(36, ("q", "k", "v", "o"))
    plan = apportion.plan(_profile(layout, 8), "lora_smoe", keep=0.6, rank=8)
    assert plan.num_lora_experts == 688
    assert max(p.num_experts for p in plan.placements) <= 8
    assert {p.top_k for p in plan.placements if p.num_experts > 1} == {2}


def test_numbers_kept_follow_the_percentile_of_the_release() -> None:
    numpy = pytest.importorskip("numpy")
    for matrices in (2, 7, 36, 108, 144):
        values = numpy.random.default_rng(0).permutation(matrices).astype(float)
        for keep in (0.1, 0.25, 0.5, 0.6, 0.9):
            above = int((values > numpy.percentile(values, 100 * (1 - keep))).sum())
            assert num_voted(keep, matrices) == max(above, 1)
    assert num_voted(1.0, 144) == 144


@settings(max_examples=100)
@given(
    layers=st.integers(1, 6),
    tasks=st.integers(2, 5),
    keep=st.floats(0.01, 1.0),
    groups=st.sampled_from(["attention/mlp", "type", "all"]),
    method=st.sampled_from(["lora_smoe", "random_votes"]),
    seed=st.integers(0, 999),
)
def test_budgets_are_exact(layers: int, tasks: int, keep: float, groups: Any, method: str, seed: int) -> None:
    layout = _dense_layout(layers)
    profile = _profile(layout, tasks, seed)
    plan = apportion.plan(profile, method, keep=keep, groups=groups, rank=2, seed=seed)
    sizes = {"attention/mlp": [4 * layers, 3 * layers], "type": [layers] * 7, "all": [7 * layers]}[groups]
    assert plan.num_lora_experts == tasks * sum(num_voted(keep, size) for size in sizes)
    sites = layout.by_name
    by_half = [
        sum(p.num_experts for p in plan.placements if (sites[p.site].kind == "attention") == attention)
        for attention in (True, False)
    ]
    if groups == "attention/mlp":
        assert by_half == [tasks * num_voted(keep, size) for size in sizes]
    routers = sum(p.num_experts * sites[p.site].in_features for p in plan.placements if p.num_experts > 1)
    factors = sum(p.num_experts * 2 * (sites[p.site].in_features + sites[p.site].out_features) for p in plan.placements)
    assert plan.cost.trainable_parameters == routers + factors


def test_votes_go_to_the_most_sensitive_matrices() -> None:
    layout = _dense_layout(3)
    profile = _profile(layout, 3)
    plan = apportion.plan(profile, "lora_smoe", keep=0.5, rank=2)
    for site in layout.sites():
        group = [other.name for other in layout.sites() if (other.kind == "attention") == (site.kind == "attention")]
        votes = sum(
            sorted(group, key=lambda name: -norms[name]).index(site.name) < num_voted(0.5, len(group))
            for norms in profile.sensitivity.values()
        )
        assert plan.by_site[site.name].num_experts == votes if votes else site.name not in plan.by_site


def test_a_task_s_size_does_not_weigh(tokens: Tensor) -> None:
    layout = _dense_layout(4)
    profile = _profile(layout, 2)
    larger = {
        "t0": {name: 1e6 * value for name, value in profile.sensitivity["t0"].items()},
        "t1": profile.sensitivity["t1"],
    }
    scaled = Profile(layout, profile.counts, profile.routing_mass, {"t0": 10**6, "t1": 5}, larger)
    plans = [apportion.plan(each, "lora_smoe", rank=2) for each in (profile, scaled)]
    assert plans[0].placements == plans[1].placements


@settings(max_examples=40)
@given(
    method=st.sampled_from(["lora_smoe", "random_votes", "uniform"]),
    unit=st.sampled_from(["experts", "parameters"]),
    share=st.floats(0.05, 1.2),
    seed=st.integers(0, 99),
)
def test_a_budget_is_met_or_just_missed(method: str, unit: str, share: float, seed: int) -> None:
    layout = _dense_layout(3)
    profile = _profile(layout, 3, seed)
    most = 63 if unit == "experts" else 3 * sum(2 * sum(_WIDTHS[s.projection]) + s.in_features for s in layout.sites())
    budget = max(int(share * most), 6 if unit == "experts" else 2000)
    plan = apportion.plan(profile, method, budget=f"{unit}={budget}", rank=2)
    taken = plan.num_lora_experts if unit == "experts" else plan.cost.trainable_parameters
    assert taken <= budget
    if method == "uniform" and unit == "experts":
        assert taken == budget
        assert len({p.num_experts for p in plan.placements} | {budget // 21, -(-budget // 21)} - {0}) <= 2
    elif method != "uniform" and taken < budget and plan.num_lora_experts < 63:
        largest = 3 * (3 if unit == "experts" else 2 * 96 + 64 + 64)  # one more vote a task, or two groups at one share
        assert budget - taken <= 2 * largest


def test_mola_follows_depth() -> None:
    layout = _dense_layout(8, ("q", "v"))
    plan = apportion.plan(_profile(layout, 1), "mola", rank=2)
    assert [p.num_experts for p in plan.placements] == [2] * 4 + [4] * 4 + [6] * 4 + [8] * 4
    for shape in ("8-6-4-2", "8-2-2-8", "5-5-5-5"):
        plan = apportion.plan(_profile(layout, 1), "mola", rank=2, experts=shape)
        numbers = {layout.by_name[p.site].layer: p.num_experts for p in plan.placements}
        assert "-".join(str(numbers[layer]) for layer in (0, 2, 4, 6)) == shape


def test_what_is_spread_adds_up() -> None:
    for total in range(30):
        numbers = spread(total, 7)
        assert sum(numbers) == total
        assert max(numbers) - min(numbers) <= 1


def test_one_task_is_placement_with_a_warning() -> None:
    profile = _profile(_dense_layout(4), 1)
    with pytest.warns(ApportionWarning, match="one task, 't0'"):
        plan = apportion.plan(profile, "lora_smoe", rank=2)
    assert {p.num_experts for p in plan.placements} == {1}
    assert plan.is_mergeable


def test_moe_models_route_their_attention(tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    batches = {f"t{n}": [{"input_ids": tokens[n : n + 1], "labels": tokens[n : n + 1]}] for n in range(3)}
    profile = apportion.profile(model, batches, sensitivity=True)
    plan = apportion.plan(profile, "lora_smoe", rank=4)
    assert plan.cost.sites_by_kind.keys() == {"attention"}
    with pytest.raises(ConfigurationError, match="is not a linear layer"):
        apportion.plan(profile, "lora_smoe", rank=4, targets="attention,experts")
    hot = apportion.plan(profile, "hellora", hot=2, rank=4, criterion="sensitivity")
    norms = profile.expert_sensitivity()
    assert list(hot.experts_by_layer().values()) == [sorted(row.topk(2).indices.tolist()) for row in norms]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"groups": "layers"}, "groups"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 4}, "top_k=4 is above"),
        ({"budget": "much"}, "budget='much' is not understood"),
        ({"budget": "experts=2"}, "too small"),
        ({"budget": 100, "keep": 0.5}, "both given"),
        ({"targets": "router"}, "no site for the target"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        apportion.plan(_profile(_dense_layout(4), 3), "lora_smoe", rank=2, **options)


def test_wrong_numbers_of_experts_are_refused() -> None:
    profile = _profile(_dense_layout(4), 3)
    for method, options, message in (
        ("mola", {"experts": "2-0"}, "not understood"),
        ("mola", {"experts": "1-2-3-4-5"}, "has 5 numbers for 4 layers"),
        ("mola", {"top_k": 9}, "top_k=9 is above"),
        ("uniform", {"experts": 0}, "experts"),
        ("uniform", {"experts": 2, "budget": 900}, "both given"),
        ("uniform", {"budget": 10}, "too small for one LoRA expert"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            apportion.plan(profile, method, rank=2, **options)
    with pytest.raises(PlanError, match="cannot use 3"):
        lora_shape(2, 4.0, num_experts=2, top_k=3)


def test_a_profile_without_sensitivity_is_refused(tokens: Tensor) -> None:
    profile = apportion.profile(build_dense(), [{"input_ids": tokens}])
    with pytest.raises(ProfileError, match="profile with --sensitivity"):
        apportion.plan(profile, "lora_smoe", rank=2)
    with pytest.raises(ProfileError, match="depends on the tasks"):
        apportion.cost(build_dense(), "lora_smoe", rank=2)


def test_budgets_are_read() -> None:
    assert parse_budget("5_000,000") == parse_budget(5_000_000) == "parameters=5000000"
    assert parse_budget("experts=688") == "experts=688"
    assert parse_budget(None) is None


def test_layouts_of_tests_are_like_models() -> None:
    names = {site.name.partition(".0.")[2] for site in _dense_layout(1).sites()}
    assert names == {site.name.partition(".0.")[2] for site in find_sites(build_dense()).sites() if site.layer == 0}
