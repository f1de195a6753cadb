"""Adapters on a model whose base weights accelerate keeps on disk and fetches for each call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import disk_offload
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import apportion
from apportion.records.profile import Profile
from tiny_models import build_tiny

ProfileOf = Callable[[nn.Module], Profile]

HOSTS = ["ExpertLora", "LinearLora", "WeightLora"]  # they read their factors without calling the modules that hold them


def _adapted(family: str, method: str, profile_of: ProfileOf) -> nn.Module:
    model = build_tiny(family)
    adapted = apportion.apply(model, apportion.plan(profile_of(model), method, hot=2, rank=2)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


@pytest.mark.parametrize("method", ["hellora", "hellori"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "listed"])
def test_logits_are_the_same_with_the_base_on_disk(
    family: str, method: str, profile_of: ProfileOf, tokens: Tensor, tmp_path: Path
) -> None:
    adapted = _adapted(family, method, profile_of)
    hosts = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits
        for number, module in enumerate(hosts):
            disk_offload(module.base_layer, tmp_path / str(number), execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for module in hosts for parameter in module.base_layer.parameters())
        assert torch.allclose(adapted(input_ids=tokens).logits, expected, atol=1e-6, rtol=0)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(input_ids=tokens).logits, expected, atol=1e-3)


@pytest.mark.parametrize("method", ["hellora", "hellori"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "listed"])
def test_logits_are_the_same_with_base_and_adapters_on_disk(
    family: str, method: str, profile_of: ProfileOf, tokens: Tensor, tmp_path: Path
) -> None:
    adapted = _adapted(family, method, profile_of)
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits
        disk_offload(
            adapted.get_base_model(), tmp_path, execution_device=torch.device("cpu"), preload_module_classes=HOSTS
        )
        assert all(parameter.is_meta for parameter in adapted.parameters())
        assert torch.allclose(adapted(input_ids=tokens).logits, expected, atol=1e-6, rtol=0)
