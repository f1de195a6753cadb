"""Any adapter name works or is refused before the model changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import apportion
from apportion.errors import AdapterError, ConfigurationError
from apportion.records.profile import Profile
from tiny_models import build_tiny

ProfileOf = Callable[[nn.Module], Profile]


@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")
@pytest.mark.parametrize(
    "name",
    ["1", "0", "mlp", "model", "layers", "experts", "self_attn", "q_proj", "down_proj", "weight", "gate", "norm", "a",
     "lm_head", "base_layer", "lora_A", "default", "ünïcode name"],
)  # fmt: skip
def test_names_that_modules_have_too(name: str, profile_of: ProfileOf, tokens: torch.Tensor) -> None:
    model = build_tiny("olmoe")
    plan = apportion.plan(profile_of(model), "hellora", hot=2, rank=2)
    adapted = apportion.apply(model, plan, adapter_name=name)
    assert adapted.receipt.trainable_parameters == plan.cost.trainable_parameters
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trained == plan.cost.trainable_parameters
    adapted(input_ids=tokens, labels=tokens).loss.backward()


@pytest.mark.parametrize("name", ["", "a.b", "train", "forward", "keys", "values", "items", "pop", "type", "modules"])
def test_names_that_no_module_dictionary_takes(name: str, profile_of: ProfileOf) -> None:
    model = build_tiny("olmoe")
    plan = apportion.plan(profile_of(model), "hellora", hot=2, rank=2)
    before = [path for path, _ in model.named_modules()]
    with pytest.raises(ConfigurationError, match="is not a valid adapter name"):
        apportion.apply(model, plan, adapter_name=name)
    assert [path for path, _ in model.named_modules()] == before


@pytest.mark.parametrize("names", [("one", "experts"), ("low_rank", "two"), ("gate_proj", "two")])
def test_adapters_that_peft_could_not_tell_apart_are_refused(names: tuple[str, str], profile_of: ProfileOf) -> None:
    model = build_tiny("olmoe")
    plan = apportion.plan(profile_of(model), "hellora", hot=2, rank=2)
    adapted = apportion.apply(model, plan, adapter_name=names[0])
    with pytest.raises(ConfigurationError, match="cannot have one called"):
        apportion.apply(adapted, plan, adapter_name=names[1])
    assert list(adapted.peft_config) == [names[0]]


def test_an_adapter_that_would_be_saved_in_part_is_not_saved(profile_of: ProfileOf, tmp_path: Path) -> None:
    model = build_tiny("olmoe")
    plan = apportion.plan(profile_of(model), "hellora", hot=2, rank=2)
    adapted = apportion.apply(model, plan)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.load_adapter(str(tmp_path / "adapter"), adapter_name="experts")
    with pytest.raises(AdapterError, match="missing"):
        adapted.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    assert not list((tmp_path / "again").rglob("*.safetensors"))
