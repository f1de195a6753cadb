"""An adapter is replaced by one with other ranks and sites, on every kind of host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import apportion
from apportion.discovery import find_sites
from apportion.errors import ConfigurationError
from apportion.peft.replace import replace_adapter
from apportion.peft.site_factors import site_factors
from apportion.records.placement import Placement
from apportion.records.shapes import LowRank
from apportion.training.procedures.plans import with_placements
from tiny_models import build_tiny


def _shaken(model: nn.Module, plan: apportion.Plan) -> nn.Module:
    adapted = apportion.apply(model, plan)
    with torch.no_grad():
        for _, _, b_OR in site_factors(adapted, "default"):
            b_OR.normal_(std=0.02)
    return adapted.eval()


def test_components_that_are_zero_can_be_dropped_and_sites_left_out(
    tiny_model: nn.Module, profile_of: Callable[[nn.Module], apportion.Profile], tokens: Tensor, tmp_path: Path
) -> None:
    plan = apportion.plan(profile_of(tiny_model), "hellora", hot=3, rank=4, alpha=8)
    model, layout = _shaken(tiny_model, plan), find_sites(tiny_model)
    empty = plan.placements[0].site
    factors, placements = {}, []
    with torch.no_grad():
        for number, (site, a_RI, b_OR) in enumerate(site_factors(model, "default")):
            kept = 0 if site == empty else 1 + number % 4
            b_OR[:, kept:] = 0
            if kept:
                factors[site] = (a_RI[:kept], b_OR[:, :kept])
                placements.append(Placement(site, LowRank(kept, 2.0 * kept)))
        before = model(input_ids=tokens).logits
        smaller = with_placements(plan, placements, layout)
        replace_adapter(model, "default", smaller, factors)
        after = model.eval()(input_ids=tokens).logits
    assert torch.allclose(after, before, atol=1e-6)
    assert {p.site for p in smaller.placements} == {p.site for p in plan.placements} - {empty}
    assert model.receipt.trainable_parameters == smaller.cost.trainable_parameters < plan.cost.trainable_parameters
    assert model.peft_config["default"].plan == smaller
    model.save_pretrained(tmp_path)
    loaded = apportion.load(build_tiny("olmoe"), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, after)


def test_factors_that_do_not_fit_are_refused_before_anything_changes(
    tiny_model: nn.Module, profile_of: Callable[[nn.Module], apportion.Profile], tokens: Tensor
) -> None:
    plan = apportion.plan(profile_of(tiny_model), "attention", rank=2)
    model, layout = _shaken(tiny_model, plan), find_sites(tiny_model)
    factors = {site: (a, b) for site, a, b in site_factors(model, "default")}
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        smaller = with_placements(plan, [replace(p, shape=LowRank(1, 2.0)) for p in plan.placements], layout)
        for wrong in (factors, {}):
            with pytest.raises(ConfigurationError, match="do not have the planned shapes"):
                replace_adapter(model, "default", smaller, wrong)
        sparse = apportion.plan(profile_of(build_tiny("olmoe")), "lori", targets=("attention",), rank=2)
        with pytest.raises(ConfigurationError, match=r"(?s)plain low-rank factors.*sparse"):
            replace_adapter(model, "default", sparse, factors)
        assert torch.equal(model(input_ids=tokens).logits, before)


def test_the_cost_of_other_placements_is_that_of_a_plan_made_with_them(
    tiny_model: nn.Module, profile_of: Callable[[nn.Module], apportion.Profile]
) -> None:
    profile = profile_of(tiny_model)
    wide, narrow = (apportion.plan(profile, "hellora", hot=3, rank=rank) for rank in (4, 2))
    changed = with_placements(wide, reversed(narrow.placements), find_sites(tiny_model))
    assert changed.placements == narrow.placements
    assert replace(changed.cost, lora_parameters=0, lora_flops_per_token=0.0) == replace(
        narrow.cost, lora_parameters=0, lora_flops_per_token=0.0
    )
