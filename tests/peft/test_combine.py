"""Several adapters as one, and adapters as plain LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import apportion
from apportion.errors import ApportionError, ConfigurationError, OutputExistsError
from apportion.peft.export import export_lora
from apportion.records.profile import Profile
from tiny_models import build_dense, build_tiny

ProfileOf = Callable[[nn.Module], Profile]


@torch.no_grad()
def _shake(model: nn.Module, adapter: str) -> None:
    """Give every trained factor other values than it starts from."""
    for name, parameter in model.named_parameters():
        if f".{adapter}" in name and parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.05)


def _two(model: Any, profile_of: ProfileOf, methods: tuple[str, str]) -> Any:
    profile = profile_of(model)
    adapted = model
    for name, method in zip(("one", "two"), methods, strict=True):
        hot = {"hot": 2} if method in ("hellora", "hellori", "cold") else {}
        adapted = apportion.apply(adapted, apportion.plan(profile, method, rank=4, alpha=6, **hot), adapter_name=name)
        adapted.set_adapter(name)
        _shake(adapted, name)
    return adapted


def _merged(model: Any, weights: dict[str, float], tokens: Tensor) -> Tensor:
    """Add the adapters' deltas, weighted, to the base weights one by one."""
    start = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    total = {name: torch.zeros_like(p) for name, p in start.items()}
    for adapter, weight in weights.items():
        model.set_adapter(adapter)
        model.merge_adapter([adapter])
        for name, p in model.named_parameters():
            if "lora_" not in name:
                total[name] += weight * (p.detach() - start[name])
        model.unmerge_adapter()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" not in name:
                p.copy_(start[name] + total[name])
    with model.disable_adapter():
        logits = model(input_ids=tokens).logits
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" not in name:
                p.copy_(start[name])
    return logits


@pytest.mark.parametrize("methods", [("hellora", "cold"), ("hellori", "hellori"), ("lora", "hellori")])
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_concatenation_is_exact(
    name: str, methods: tuple[str, str], profile_of: ProfileOf, tokens: Tensor, tmp_path: Path
) -> None:
    model = build_tiny(name)
    base = copy.deepcopy(model)
    both = _two(model, profile_of, methods)
    both.add_weighted_adapter(["one", "two"], [0.7, -0.4], "both", combination_type="cat")
    both.set_adapter("both")
    with torch.no_grad():
        found = both(input_ids=tokens).logits
        assert torch.allclose(found, _merged(both, {"one": 0.7, "two": -0.4}, tokens), atol=2e-5)
        both.set_adapter("both")
        both.save_pretrained(tmp_path, selected_adapters=["both"])
        loaded = apportion.load(base, tmp_path / "both")
        assert torch.allclose(loaded(input_ids=tokens).logits, found, atol=1e-6)


def test_a_weighted_sum_adds_factors_as_peft_does(profile_of: ProfileOf, tokens: Tensor) -> None:
    model = build_dense()
    both = _two(copy.deepcopy(model), profile_of, ("lora", "lora"))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names)
    theirs = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="one")
    theirs.add_adapter("two", config)
    theirs.load_state_dict(both.state_dict())
    for each in (both, theirs):
        each.add_weighted_adapter(["one", "two"], [0.5, 0.4], "both", combination_type="linear")
        each.set_adapter("both")
    assert torch.allclose(both(input_ids=tokens).logits, theirs(input_ids=tokens).logits, atol=1e-6)


def test_what_cannot_be_combined_is_refused(profile_of: ProfileOf, tokens: Tensor) -> None:
    both = _two(build_tiny("olmoe"), profile_of, ("hellora", "cold"))
    for adapters, weights, kwargs, message in (
        (["one", "two"], [1.0], {}, "2 adapters and 1 weights"),
        (["one", "three"], [1.0, 1.0], {}, "no adapter 'three'"),
        (["one", "two"], [1.0, 1.0], {"combination_type": "linear"}, "other sites or ranks"),
        (["one", "two"], [1.0, 1.0], {"combination_type": "svd"}, "cat or linear"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            both.add_weighted_adapter(adapters, weights, "new", **kwargs)
    with pytest.raises(ConfigurationError, match="already"):
        both.add_weighted_adapter(["one", "two"], [1.0, 1.0], "one")
    routed = apportion.plan(profile_of(both), "uniform", experts=2, rank=4)
    both = apportion.apply(both, routed, adapter_name="routed")
    with pytest.raises(ConfigurationError, match="gates"):
        both.add_weighted_adapter(["one", "routed"], [1.0, 1.0], "new")
    assert set(both.peft_config) == {"one", "two", "routed"}


@pytest.mark.parametrize("weights", [[float("nan"), 1.0], [float("inf"), 1.0], [1e80, 1.0]])
@pytest.mark.parametrize("how", ["cat", "linear"])
def test_weights_that_give_no_finite_adapter_are_refused(weights: list[float], how: str, profile_of: ProfileOf) -> None:
    both = _two(build_tiny("olmoe"), profile_of, ("hellora", "hellora"))
    with pytest.raises(ApportionError, match="finite"):
        both.add_weighted_adapter(["one", "two"], weights, "both", combination_type=how)
    assert set(both.peft_config) == {"one", "two"}
    assert not any(".both" in name for name, _ in both.named_parameters())


@pytest.mark.parametrize(("name", "method"), [("dense", "lori"), ("dense", "lora"), ("olmoe", "lori")])
def test_exported_factors_load_in_stock_peft(
    name: str, method: str, profile_of: ProfileOf, tokens: Tensor, tmp_path: Path
) -> None:
    model = build_dense() if name == "dense" else build_tiny(name)
    base = copy.deepcopy(model)
    options: dict[str, Any] = {"targets": "attention"} if name == "olmoe" else {"ranks": {"dense": 6}}
    adapted = apportion.apply(model, apportion.plan(profile_of(model), method, rank=4, **options))
    _shake(adapted, "default")
    export_lora(adapted, tmp_path / "plain")
    stock = peft.PeftModel.from_pretrained(base, str(tmp_path / "plain"))
    assert type(stock.peft_config["default"]) is peft.LoraConfig
    assert torch.allclose(stock(input_ids=tokens).logits, adapted.eval()(input_ids=tokens).logits, atol=1e-6)
    with pytest.raises(OutputExistsError):
        export_lora(adapted, tmp_path / "plain")


def test_what_plain_lora_cannot_say_is_refused(profile_of: ProfileOf, tmp_path: Path) -> None:
    model = build_tiny("olmoe")
    adapted = apportion.apply(model, apportion.plan(profile_of(model), "hellori", hot=2, rank=4))
    with pytest.raises(ConfigurationError, match="not a separate linear layer"):
        export_lora(adapted, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
