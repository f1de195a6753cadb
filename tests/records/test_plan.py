"""Plans: the file is short, whole, and the same plan again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import apportion
from apportion.errors import PlanError
from apportion.records.braces import expand_braces, fold_braces, num_expanded
from apportion.records.files import seal
from apportion.records.plan import Plan


@pytest.fixture
def plan(tiny_model: nn.Module, tokens: Tensor) -> Plan:
    return apportion.plan(apportion.profile(tiny_model, [{"input_ids": tokens}]), "hellora", hot=2, rank=4)


def test_a_saved_plan_is_the_same_plan(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert apportion.load_plan(tmp_path / "plan.json") == plan


def test_the_file_is_short(tiny_model: nn.Module, tokens: Tensor, tmp_path: Path) -> None:
    profile = apportion.profile(tiny_model, [{"input_ids": tokens}])
    apportion.plan(profile, "lora", rank=4).save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert "model.layers.0.mlp.experts.{0,1,2,3,4,5,6,7}.{gate_proj,up_proj,down_proj}" in text
    assert len(text) < 3000


@pytest.mark.parametrize("cut", [0, 1, 100, -2])
def test_a_truncated_plan_is_refused(plan: Plan, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_text(path.read_text()[:cut])
    with pytest.raises(PlanError, match="truncated or not JSON"):
        apportion.load_plan(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 8}, "changed after it was written"),
        ({"rank": "many"}, "place:  rank"),
        ({"colour": "red"}, "place:  colour"),
        ({"schema_version": 99}, "schema version 99"),
        ({"placements": [{"shape": {}}]}, r"place:  placements\.0\.sites"),
    ],
)
def test_an_edited_plan_is_refused(plan: Plan, tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.as_dict() | change))
    with pytest.raises(PlanError, match=message):
        apportion.load_plan(path)


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"the plan .* does not exist"):
        apportion.load_plan(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(PlanError, match="expected an object, found a list"):
        apportion.load_plan(tmp_path / "list.json")


def test_a_seal_that_is_missing_names_its_place(plan: Plan) -> None:
    data = {name: value for name, value in plan.as_dict().items() if name != "seal"}
    with pytest.raises(PlanError, match="place:  seal"):
        Plan.from_dict(data)


NAMES = st.lists(
    st.builds(
        lambda block, number, last: ".".join(part for part in (block, number, last) if part),
        st.sampled_from(["m.layers.0.experts", "m.layers.1.experts", "m.attn"]),
        st.sampled_from(["", "0", "7", "12"]),
        st.sampled_from(["gate", "up", "down"]),
    ),
    unique=True,
)


@given(names=NAMES)
def test_braces_lose_nothing(names: list[str]) -> None:
    folded = fold_braces(names)
    assert sorted(name for pattern in folded for name in expand_braces(pattern)) == sorted(names)


@pytest.mark.parametrize("pattern", ["a.b", "a.{0,3}.{up,down}", "{a}", "{,}.x", "{a,b}{c,d,e}", ""])
def test_names_are_counted_before_they_are_made(pattern: str) -> None:
    assert num_expanded(pattern) == len(expand_braces(pattern))


@pytest.mark.parametrize("pattern", ["a.{b", "a}.b", "a.{b,{c,d}}", "{{a}}"])
def test_braces_that_do_not_match_are_refused(pattern: str) -> None:
    with pytest.raises(PlanError, match="unbalanced or nested"):
        num_expanded(pattern)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "has rank 0"),
        ({"rank": -4}, "has rank -4"),
        ({"rank": 65_537}, "has rank 65537"),
        ({"alpha": INF}, "has alpha inf and rank 4"),
        ({"alpha": -INF}, "has alpha -inf and rank 4"),
        ({"alpha": NAN}, "has alpha nan and rank 4"),
        ({"alpha": 1e300}, r"has alpha 1e\+300 and rank 4"),
        ({"alpha": 1e308}, r"has alpha 1e\+308 and rank 4"),
        ({"alpha": 1e-60}, "has alpha 1e-60 and rank 4"),
        ({"alpha": 0}, "has alpha 0.0 and rank 4"),
        ({"alpha": -8.0}, "has alpha -8.0 and rank 4"),
        ({"num_experts": 0}, "cannot use 1 of them"),
        ({"num_experts": 1}, "has 1 LoRA experts of rank 4"),
        ({"num_experts": 65_536}, "has 65536 LoRA experts of rank 4"),
        ({"kind": "cubic"}, "unknown shape 'cubic'"),
        ({"colour": "red"}, "colour of shape 'low_rank'"),
        ({"rank": "many"}, "rank of shape 'low_rank'"),
    ],
)
def test_numbers_that_no_adapter_can_have_are_refused_though_resealed(
    plan: Plan, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    data = plan.as_dict()
    del data["seal"]
    shape = data["placements"][0]["shape"]
    routed = {"kind": "routed", "expert": shape, "num_experts": 2, "top_k": 1}
    changes = [
        {"placements": [data["placements"][0] | {"shape": (routed if "num_experts" in change else shape) | change}]}
    ]
    if isinstance(next(iter(change.values())), (int, float)) and "num_experts" not in change:
        changes.append(change)  # the plan's own rank and alpha
    for changed in (data | one for one in changes):
        (tmp_path / "plan.json").write_text(json.dumps(changed | {"seal": seal(changed)}))
        with pytest.raises(PlanError, match=message) as caught:
            apportion.load_plan(tmp_path / "plan.json")
        assert str(caught.value).count("fix:") == 1


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"trainable_parameters": "5"}, "trainable_parameters"),
        ({"stored_parameters": -1}, "stored_parameters"),
        ({"base_parameters": 0}, "base_parameters"),
        ({"adapter_flops_per_token": INF}, "adapter_flops_per_token"),
        ({"lora_flops_per_token": NAN}, "lora_flops_per_token"),
        ({"routing": "astrology"}, "routing"),
        ({"sites_by_kind": {"router": 1.5}}, r"sites_by_kind\.router"),
        ({"stored_indices": True}, "stored_indices"),
    ],
)
def test_an_impossible_cost_is_refused_though_resealed(plan: Plan, changes: dict[str, object], place: str) -> None:
    data = {name: value for name, value in plan.as_dict().items() if name != "seal"}
    data["cost"] = data["cost"] | changes
    with pytest.raises(PlanError, match=rf"its cost is invalid\.\n  place:  cost\.{place}\n"):
        Plan.from_dict(data | {"seal": seal(data)})


def test_a_cost_without_a_figure_is_refused_though_resealed(plan: Plan) -> None:
    data = {name: value for name, value in plan.as_dict().items() if name != "seal"}
    del data["cost"]["lora_parameters"]
    with pytest.raises(PlanError, match=r"cost\.lora_parameters"):
        Plan.from_dict(data | {"seal": seal(data)})


def test_a_site_that_is_named_twice_is_refused_though_resealed(plan: Plan) -> None:
    data = {name: value for name, value in plan.as_dict().items() if name != "seal"}
    data["placements"] = data["placements"] * 2
    with pytest.raises(PlanError, match="lists a site 2 times"):
        Plan.from_dict(data | {"seal": seal(data)})


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"a":' * 100 + "1" + "}" * 100, '{"model": "\\ud800"}'])
def test_text_that_python_cannot_read_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=r"plan\.json is truncated or not JSON"):
        apportion.load_plan(tmp_path / "plan.json")
