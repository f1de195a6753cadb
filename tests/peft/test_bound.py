"""A plan on its way to the layers: it is neither read nor hashed again, and every factor is drawn once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apportion
from apportion.adapters.factors import DenseFactor
from apportion.errors import ConfigurationError
from apportion.peft import start, tuner
from apportion.records import plan_schema
from apportion.records.mask import Mask
from apportion.records.plan import Plan
from tiny_models import build_tiny

ProfileOf = Callable[[nn.Module], apportion.Profile]


def _counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Note the second argument of every call of a function."""
    calls: list[Any] = []
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1] if len(args) > 1 else None)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


def _plan(profile_of: ProfileOf, method: str) -> tuple[nn.Module, Plan]:
    model = build_tiny("olmoe")
    return model, apportion.plan(profile_of(model), method, rank=2)


@pytest.mark.parametrize("method", ["hellora", "hellori"])
def test_apply_reads_no_plan_and_draws_every_factor_once(
    profile_of: ProfileOf, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    model, plan = _plan(profile_of, method)
    assert plan.seal  # hashed before
    draws = _counted(monkeypatch, start, "draw")
    hashed = _counted(monkeypatch, plan_schema, "seal")
    read = _counted(monkeypatch, plan_schema, "shape_from_dict")
    adapted = apportion.apply(model, plan)
    assert Counter(draws) == Counter(placement.site for placement in plan.placements)
    assert not read
    assert not hashed
    assert adapted.peft_config["default"].plan is plan
    assert adapted.base_model.bound["default"].plan is plan
    assert adapted.base_model.bound["default"].frozen is None  # held by the factors alone


def test_saving_hashes_the_plan_once(profile_of: ProfileOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model, plan = _plan(profile_of, "hellora")
    hashed = _counted(monkeypatch, plan_schema, "seal")
    adapted = apportion.apply(model, plan)
    for name in ("one", "two"):
        adapted.save_pretrained(tmp_path / name)
    assert len(hashed) == 1
    assert apportion.load(build_tiny("olmoe"), tmp_path / "one").peft_config["default"].plan == plan
    assert len(hashed) == 2  # the file's seal


def test_the_configuration_holds_nothing_that_is_not_saved(profile_of: ProfileOf) -> None:
    model, plan = _plan(profile_of, "hellori")
    config = apportion.apply(model, plan).peft_config["default"]
    extra = set(vars(config)) - set(config.to_dict()) - {"promised_digests"}
    assert not any(isinstance(getattr(config, name), (Mask, torch.Tensor, dict)) for name in extra)


def test_no_linear_layer_is_initialised_for_nothing(profile_of: ProfileOf, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = _plan(profile_of, "lora")
    drawn = _counted(monkeypatch, nn.init, "kaiming_uniform_")
    apportion.apply(model, plan)
    linear = [
        placement for placement in plan.placements if placement.name.expert is None and "gate" not in placement.site
    ]
    assert len(drawn) <= 3 * len(linear)  # by PEFT, in its own layers


def test_a_factor_that_was_not_started_makes_itself_heard() -> None:
    factor = DenseFactor((2, 3), torch.device("cpu"), torch.float32)
    assert factor(torch.ones(1, 3)).isnan().all()


@pytest.mark.parametrize("others", [False, True])
def test_a_failed_attachment_leaves_the_model_as_it_was(
    others: bool, profile_of: ProfileOf, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = build_tiny("olmoe").eval()
    plan = apportion.plan(profile_of(model), "hellora", hot=2, rank=2)
    if others:
        model = apportion.apply(model, apportion.plan(profile_of(model), "lora", rank=2)).eval()
    names, logits = set(model.state_dict()), model(input_ids=tokens).logits
    make, calls = tuner.make_expert_shapes, []

    def fail(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return make(*args)

    monkeypatch.setattr(tuner, "make_expert_shapes", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        apportion.apply(model, plan, adapter_name="new")
    assert set(model.state_dict()) == names
    assert torch.equal(model(input_ids=tokens).logits, logits)
    monkeypatch.undo()
    assert apportion.apply(model, plan, adapter_name="new").receipt.trainable_parameters > 0


def test_an_adapter_is_loaded_into_a_base_alone(profile_of: ProfileOf, tmp_path: Path) -> None:
    model = build_tiny("olmoe")
    adapted = apportion.apply(model, apportion.plan(profile_of(model), "lora", rank=2))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="has adapters already"):
        apportion.load(adapted, tmp_path, adapter_name="other")
    assert list(adapted.peft_config) == ["default"]


def test_the_backward_pass_may_run_under_autocast(profile_of: ProfileOf, tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    adapted = apportion.apply(model, apportion.plan(profile_of(model), "hellora", hot=2, rank=2))
    with torch.autocast("cpu", torch.bfloat16):
        adapted(input_ids=tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)
