"""What `cost` counts beforehand is what `apply` attaches: for every method, on models of many forms."""

from __future__ import annotations

import copy
import typing
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

import apportion
from apportion.accounting import layout_of
from apportion.discovery import find_sites
from apportion.methods.registry import METHODS
from apportion.peft.attach import PhaseOptions
from apportion.records.profile import Profile
from apportion.records.site import Layout
from architectures import build
from tiny_models import TINY, build_dense, build_tiny

OTHERS = ("granitemoe", "jamba", "lfm2_moe", "llama4", "phimoe", "qwen3_moe")
MODELS = (*sorted(TINY), *OTHERS, "dense")


@pytest.fixture(autouse=True)
def _one_thread(_seeded: None) -> None:
    """Tiny products gain nothing from threads, which wait for each other where the machine has other work."""
    torch.set_num_threads(1)


@cache
def _model(name: str) -> PreTrainedModel:
    if name == "dense":
        return build_dense()
    return build(name) if name in OTHERS else build_tiny(name)


@cache
def _layout(name: str) -> Layout:
    return find_sites(_model(name))


def _profile(layout: Layout, seed: int) -> Profile:
    """Make up what any method may ask for: counts, mass and sensitivity of two tasks."""
    generator = torch.Generator().manual_seed(seed)
    tasks = ("a", "b")
    width = max((block.num_experts for block in layout.blocks), default=0)
    counts, mass, sensitivity = {}, {}, {}
    for task in tasks:
        counts[task] = torch.randint(1, 20, (len(layout.blocks), width), generator=generator)
        for row, block in enumerate(layout.blocks):
            counts[task][row, block.num_experts :] = 0
        mass[task] = counts[task] * torch.rand(counts[task].shape, generator=generator, dtype=torch.float64)
        norms = torch.rand(len(layout.by_name), generator=generator).tolist()
        sensitivity[task] = dict(zip(layout.by_name, norms, strict=True))
    return Profile(layout, counts, mass, dict.fromkeys(tasks, 64), sensitivity)


def _options(data: st.DataObject, method: str, layout: Layout) -> dict[str, Any]:
    """Draw those of the shared options that the method has; the others keep their defaults."""
    fields = METHODS[method].options.model_fields
    chooses_experts = "hot" in fields
    options: dict[str, Any] = {}
    layers = sorted({site.layer for site in layout.sites()})
    if data.draw(st.booleans(), "some layers"):
        drawn = set(data.draw(st.lists(st.sampled_from(layers), min_size=1), "layers"))
        drawn |= {layout.blocks[-1].layer} if chooses_experts else set()
        if method == "attention":  # some layers convolve instead
            drawn |= {next(site.layer for site in layout.sites() if site.kind == "attention")}
        layers = sorted(drawn)
        options["layers"] = ",".join(map(str, layers))
    routed = "top_k" in fields  # several LoRA experts stand on linear layers alone
    sites = [site for site in layout.sites() if site.layer in layers and not (routed and site.storage != "linear")]
    if routed:
        sites = [site for site in sites if site.kind in ("attention", "shared", "dense")]
        layers = sorted({site.layer for site in sites})
        if "layers" in options:
            options["layers"] = ",".join(map(str, layers))
    if "targets" in fields and data.draw(st.booleans(), "some targets"):
        known = sorted({site.kind for site in sites} | {f"{site.kind}.{site.projection}" for site in sites})
        drawn_targets = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True), "targets")
        options["targets"] = (*drawn_targets, "experts.down") if chooses_experts else tuple(drawn_targets)
    if method == "attention":
        options.pop("targets", None)
    targets = options.get("targets", ("attention",) if method == "attention" else tuple({s.kind for s in sites}))
    if "ranks" in fields and method != "marginal" and data.draw(st.booleans(), "ranks"):
        kinds = sorted({target.partition(".")[0] for target in targets} & {site.kind for site in sites})
        options["ranks"] = data.draw(st.dictionaries(st.sampled_from(kinds), st.integers(1, 4), max_size=2), "ranks")
    if chooses_experts:
        fewest = min(block.num_experts for block in layout.blocks)
        percent = st.integers(1, 100).map("{}%".format)
        covered = st.integers(5, 100).map(lambda share: f"coverage={share / 100}")
        options["hot"] = data.draw(st.one_of(st.integers(1, fewest), percent, covered), "hot")
    if method == "mola":
        placed = {s.layer for s in sites if s.kind in targets or f"{s.kind}.{s.projection}" in targets}
        numbers = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=len(placed)), "experts")
        options["experts"] = "-".join(map(str, numbers))
    if method == "uniform":
        options["experts"] = data.draw(st.integers(1, 4), "experts")
    if "keep" in fields:
        options["keep"] = data.draw(st.floats(0.1, 1), "keep")
    if method == "marginal":
        unit = data.draw(st.sampled_from(["parameters", "flops"]), "unit")
        options["budget"] = f"{unit}={data.draw(st.integers(600, 20_000), 'budget')}"
    if "criterion" in fields:
        criteria = typing.get_args(fields["criterion"].annotation)
        options["criterion"] = data.draw(st.sampled_from(criteria), "criterion")
    return options


def _attached(model: nn.Module, plan: apportion.Plan, *, store_a: bool) -> tuple[int, int, int]:
    """Count what trains on the model, and the numbers and positions that a checkpoint holds."""
    adapted = apportion.apply(copy.deepcopy(model), plan, phase=PhaseOptions(store_a=store_a))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    state = get_peft_model_state_dict(adapted)
    indices = sum(tensor.numel() for name, tensor in state.items() if name.endswith(".indices"))
    return trained, sum(tensor.numel() for tensor in state.values()) - indices, indices


@pytest.mark.parametrize("method", sorted(METHODS))
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_costs_beforehand_equal_attached_parameters(method: str, data: st.DataObject) -> None:
    chooses_experts = "hot" in METHODS[method].options.model_fields
    name = data.draw(st.sampled_from([name for name in MODELS if name != "dense" or not chooses_experts]), "model")
    model, layout = _model(name), _layout(name)
    options = _options(data, method, layout)
    rank, seed = data.draw(st.integers(1, 4), "rank"), data.draw(st.integers(0, 5), "seed")
    profile = _profile(layout, seed)
    plan = apportion.plan(profile, method, rank=rank, seed=seed, **options)
    measured = apportion.cost(model, method, rank=rank, seed=seed, profile=profile, **options)
    store_a = plan.is_sparse and data.draw(st.booleans(), "store_a")
    trained, stored, indices = _attached(model, plan, store_a=store_a)
    assert measured == plan.cost
    assert (measured.trainable_parameters, measured.stored_indices) == (trained, indices)
    assert measured.stored_parameters + (measured.frozen_parameters if store_a else 0) == stored
    assert sum(plan.cost.sites_by_kind.values()) == len(plan.placements)
    without_profile = not METHODS[method].reads_tasks and not options.get("criterion", "").startswith("sensitivity")
    if without_profile and not str(options.get("hot", "")).startswith("coverage"):
        source = model if name == "listed" else model.config
        assert (
            apportion.cost(source, method, rank=rank, **options).trainable_parameters == measured.trainable_parameters
        )


@pytest.mark.parametrize("name", [name for name in MODELS if name != "listed"])
def test_a_configuration_has_the_models_sites(name: str) -> None:
    assert layout_of(_model(name).config) == _layout(name)
