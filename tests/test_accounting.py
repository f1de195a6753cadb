"""Costs from a configuration: the published figures, and what `apply` attaches."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, nn
from transformers import AutoConfig, OlmoeConfig, PreTrainedConfig

import apportion
from apportion.errors import ConfigurationError, PlanMismatchError
from tiny_models import build_tiny

OLMOE_1B_7B = {"intermediate_size": 1024}  # the rest is the configuration class's default


def test_published_figures_of_olmoe() -> None:
    config = OlmoeConfig(**OLMOE_1B_7B)
    lora = apportion.cost(config, "lora", rank=32)
    assert lora.base_parameters == 6_919_161_856
    assert lora.trainable_parameters == 311_459_840
    hot = {k: apportion.cost(config, "hellora", hot=k, rank=32) for k in (4, 8, 16)}
    assert {k: cost.trainable_parameters for k, cost in hot.items()} == {4: 28_344_320, 8: 47_218_688, 16: 84_967_424}
    assert hot[8].lora_count_ratio == pytest.approx(0.1516, abs=5e-5)
    assert hot[8].lora_percentage_ratio == pytest.approx(0.157, abs=5e-4)
    assert hot[8].routing == "even"


def test_published_figures_of_mixtral() -> None:
    config = AutoConfig.for_model("mixtral")
    assert apportion.cost(config, "lora", rank=32).trainable_parameters == 484_450_304
    assert apportion.cost(config, "hellora", hot=2, rank=32).trainable_parameters == 144_711_680


@pytest.mark.parametrize("method", ["lora", "attention", "hellora", "random", "cold"])
def test_costs_from_a_configuration_equal_those_of_a_plan(any_model: nn.Module, tokens: Tensor, method: str) -> None:
    options = {"hot": 2} if method in ("hellora", "random", "cold") else {}
    profile = apportion.profile(any_model, [{"input_ids": tokens}])
    planned = apportion.plan(profile, method, rank=4, **options).cost
    counted = apportion.cost(any_model, method, rank=4, **options)
    assert counted.trainable_parameters == planned.trainable_parameters
    assert apportion.cost(any_model, method, rank=4, profile=profile, **options) == planned


def test_a_config_file_is_enough(tmp_path: Path) -> None:
    OlmoeConfig(**OLMOE_1B_7B).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        assert apportion.cost(path, "hellora", hot=8, rank=32).trainable_parameters == 47_218_688


def test_a_profile_of_another_model_is_refused(tiny_model: nn.Module, tokens: Tensor) -> None:
    profile = apportion.profile(tiny_model, [{"input_ids": tokens}])
    with pytest.raises(PlanMismatchError, match="another architecture"):
        apportion.cost(build_tiny("mixtral"), "hellora", hot=2, rank=4, profile=profile)


class _Unknown(PreTrainedConfig):
    model_type = "unknown_to_everyone"


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="unknown_to_everyone"):
        apportion.cost(_Unknown(), "lora")
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ConfigurationError, match="cannot be read"):
        apportion.cost(tmp_path, "lora")
