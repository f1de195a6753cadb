"""Pictures for the terminal: every expert has its cell, and the planned ones are marked."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table
from torch import Tensor

import apportion
from apportion.cli.render import cost_table, heat_map, readable_bytes
from apportion.cli.terminal import Terminal, as_text
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


def test_without_colours_the_heat_map_shows_digits(tokens: Tensor) -> None:
    profile = apportion.profile(build_tiny("olmoe", num_experts=48), [{"input_ids": tokens}])
    plan = apportion.plan(profile, "hellora", hot=3, rank=4)
    console = Terminal(file=io.StringIO(), record=True)
    assert not console.has_colours
    console.print(heat_map(profile, plan, digits=True))
    text = console.export_text()
    assert "tenths of the hottest expert" in text
    assert text.count("9") >= 2
    assert text.count("●") == 1 + 2 * 3


HOSTILE = "[red]a[/nothing]\\[b]\x1b[31m\x07\r\x9b\u202e\udcff:smile: {x}"


def test_names_reach_the_terminal_as_they_are() -> None:
    console = Terminal(file=io.StringIO(), record=True, force_terminal=True, width=200)
    table = Table("name", title=HOSTILE)
    table.add_row(HOSTILE + "\nnext")
    console.print(table)
    console.print(f"-> {HOSTILE}")
    console.say("error:", "bold red", HOSTILE)
    with console.status("start") as status:
        status.update(as_text(HOSTILE))
    text = console.export_text()
    shown = r"[red]a[/nothing]\[b]\x1b[31m\x07\r\x9b\u202e\udcff:smile: {x}"
    assert text.count(shown) >= 4
    assert r"{x}\nnext" in text
    assert not set(text) & {"\x1b", "\x07", "\r", "\x9b", "\u202e", "\udcff"}


def test_tables_are_whole_where_no_terminal_is() -> None:
    written = io.StringIO()
    console = Terminal(file=written)
    table = Table("contender", "score")
    table.add_row("c" * 300, "s" * 300)
    console.print(table)
    console.print("w " * 500)
    assert "c" * 300 in written.getvalue()
    assert "s" * 300 in written.getvalue()
    assert "w " * 499 in written.getvalue()


def test_at_eighty_columns_numbers_wrap_and_names_do_not() -> None:
    console = Terminal(file=io.StringIO(), record=True, force_terminal=True, width=80)
    table = Table()
    for name in ("task", "contender"):
        table.add_column(name)
    for name in ("budget", "exact match", "loss", "forgetting"):
        table.add_column(name, justify="right")
    for contender in ("hellora_with_hot_4", "hellora_with_hot_8"):
        table.add_row("siblings", contender, "1,234,567", *["0.123 (0.100 to 0.150)"] * 3)
    console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert "hellora_with_hot_4" in text
    assert "hellora_with_hot_8" in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("0.123") == 6


def test_names_that_are_too_long_for_a_terminal_are_wrapped() -> None:
    console = Terminal(file=io.StringIO(), record=True, force_terminal=True, width=80)
    table = Table("contender")
    table.add_column("loss", justify="right")
    table.add_row("abcdefghij" * 20, "1.234")
    console.print(table)
    shown = console.export_text()
    assert "…" not in shown
    assert "".join(character for character in shown if character.isalpha()).count("abcdefghij") >= 15
