"""Any adapter name works or is refused before the model changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import apportion
from apportion.errors import ConfigurationError
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
