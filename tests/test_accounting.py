"""Costs from a configuration: the published figures, and what `apply` attaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from transformers import OlmoeConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import apportion
from apportion.accounting import layout_of
from apportion.configurations import config_source, known_configurations
from apportion.discovery import find_sites
from apportion.errors import ConfigurationError, PlanMismatchError
from architectures import NOT_SUPPORTED, build, tiny_config
from tiny_models import build_tiny

PUBLISHED = [
    ("olmoe-1b-7b", "lora", {}, 311_459_840),
    ("olmoe-1b-7b", "hellora", {"hot": 4}, 28_344_320),
    ("olmoe-1b-7b", "hellora", {"hot": 8}, 47_218_688),
    ("olmoe-1b-7b", "hellora", {"hot": 16}, 84_967_424),
    ("mixtral-8x7b", "lora", {}, 484_450_304),
    ("mixtral-8x7b", "hellora", {"hot": 2}, 144_711_680),
    ("deepseek-moe-16b", "lora", {"targets": "attention,experts,shared,dense"}, 601_843_712),
    ("deepseek-moe-16b", "hellora", {"hot": 6, "targets": "attention,experts,shared,dense"}, 82_282_496),
    ("deepseek-moe-16b", "hellora", {"hot": 12, "targets": "attention,experts,shared,dense"}, 136_030_208),
]
BASE_PARAMETERS = {
    "deepseek-moe-16b": 16_375_728_128,
    "deepseek-v2-lite": 15_706_484_224,
    "gpt-oss-20b": 20_914_757_184,
    "mixtral-8x22b": 140_620_634_112,
    "mixtral-8x7b": 46_702_792_704,
    "olmoe-1b-7b": 6_919_161_856,
    "qwen3-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize(("name", "method", "options", "trainable"), PUBLISHED)
def test_published_figures(name: str, method: str, options: dict[str, Any], trainable: int) -> None:
    assert apportion.cost(config_source(name), method, rank=32, **options).trainable_parameters == trainable


@pytest.mark.parametrize("name", known_configurations())
def test_shipped_configurations_are_the_published_models(name: str) -> None:
    layout = layout_of(config_source(name))
    if name == "deepseek-v3":  # 671 billion without the head for predicting further tokens
        assert layout.base_parameters // 10**9 == 671
    else:
        assert layout.base_parameters == BASE_PARAMETERS[name]
    assert all(block.top_k for block in layout.blocks)


OLMOE_1B_7B = {"intermediate_size": 1024}  # the rest is the configuration class's default


def test_published_ratios_of_olmoe() -> None:
    cost = apportion.cost(OlmoeConfig(**OLMOE_1B_7B), "hellora", hot=8, rank=32)
    assert cost.lora_count_ratio == pytest.approx(0.1516, abs=5e-5)
    assert cost.lora_percentage_ratio == pytest.approx(0.157, abs=5e-4)
    assert cost.routing == "even"


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


def test_a_vision_language_configuration_is_counted() -> None:
    model = build("qwen3_vl_moe")
    assert layout_of(model.config) == find_sites(model)


def test_a_profile_of_another_model_is_refused(tiny_model: nn.Module, tokens: Tensor) -> None:
    profile = apportion.profile(tiny_model, [{"input_ids": tokens}])
    with pytest.raises(PlanMismatchError, match="another architecture"):
        apportion.cost(build_tiny("mixtral"), "hellora", hot=2, rank=4, profile=profile)


@pytest.mark.parametrize("model_type", sorted(NOT_SUPPORTED))
def test_a_model_that_is_no_language_model_is_refused(model_type: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{model_type}.*not a causal language model"):
        apportion.cost(tiny_config(CONFIG_MAPPING[model_type], {}), "lora")


class _Unknown(PreTrainedConfig):
    model_type = "unknown_to_everyone"


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="unknown_to_everyone"):
        apportion.cost(_Unknown(), "lora")
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ConfigurationError, match="cannot be read"):
        apportion.cost(tmp_path, "lora")
