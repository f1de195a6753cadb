"""Pictures for the terminal: every expert has its cell, and the planned ones are marked."""

from __future__ import annotations

import pytest
from rich.console import Console
from torch import Tensor

import apportion
from apportion.cli.render import cost_table, heat_map, readable_bytes
from tiny_models import build_tiny


@pytest.mark.parametrize("num_experts", [8, 48, 100])
def test_the_heat_map_marks_planned_experts(tokens: Tensor, num_experts: int) -> None:
    model = build_tiny("olmoe", num_experts=num_experts)
    profile = apportion.profile(model, [{"input_ids": tokens}])
    plan = apportion.plan(profile, "hellora", hot=3, rank=4)
    console = Console(record=True, width=100)
    console.print(heat_map(profile, plan))
    text = console.export_text()
    assert text.count("●") == 1 + 2 * 3  # the legend, and three experts in each of two layers
    hot = plan.experts_by_layer()["model.layers.0.mlp.experts"]
    share = profile.counts["default"][0][hot].sum() / profile.counts["default"][0].sum()
    assert f"{share:.0%}" in text


def test_the_cost_table_names_both_ratios(tokens: Tensor) -> None:
    cost = apportion.cost(build_tiny("olmoe"), "hellora", hot=2, rank=4)
    console = Console(record=True, width=160)
    console.print(cost_table(cost, "title"))
    text = console.export_text()
    assert f"{cost.lora_count_ratio:.2%}" in text
    assert f"{cost.lora_percentage_ratio:.2%}" in text
    assert "even routing" in text


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (1000, "1.0 kB"), (2.5e9, "2.5 GB"), (3e15, "3,000.0 TB")])
def test_bytes_have_units(count: float, text: str) -> None:
    assert readable_bytes(count) == text
