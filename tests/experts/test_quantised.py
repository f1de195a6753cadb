"""Quantised experts in discovery and profiling: the layout and the numbers are those of the dequantised twin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchao.quantization import FqnToConfig
from transformers import AutoModelForCausalLM, GptOssConfig, OlmoeConfig, TorchAoConfig

import apportion
from apportion.discovery import find_sites
from apportion.errors import ConfigurationError
from apportion.experts.forms import known_form
from apportion.experts.weights import stacked_weight
from apportion.profiling.run import weights_sample
from quantised_models import QUANTISERS, TORCHAO, WIDTHS, build_twins
from tiny_models import build_tiny


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Products of a few rows wait for a second thread, far longer than they run on a busy machine."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_sites_and_fingerprint_are_those_of_the_plain_model(quantiser: str) -> None:
    packed, plain = build_twins(quantiser)
    assert find_sites(packed) == find_sites(plain)


@pytest.mark.parametrize("name", ["nf4", "fp4, nested"])
def test_no_expert_is_dequantised_to_find_sites(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plain = build_twins(name)
    layout = find_sites(plain)
    for module in packed.modules():
        if parametrize.is_parametrized(module):
            for chain in module.parametrizations.values():
                monkeypatch.setattr(chain[0], "forward", _never)
    assert find_sites(packed) == layout
    plan = apportion.plan(apportion.profile(plain, [{"input_ids": torch.arange(3, 19)[None]}]), "hellora", rank=2)
    adapted = apportion.apply(packed, plan)
    assert adapted.receipt.frozen_parameters == layout.base_parameters


def _never(packed: Tensor) -> Tensor:
    raise AssertionError("all experts were dequantised")


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_profiles_equal_those_of_the_dequantised_twin(quantiser: str, tokens: Tensor) -> None:
    profiles = []
    for model in build_twins(quantiser):
        batch = {"input_ids": tokens, "labels": tokens}
        profiles.append(apportion.profile(model, [batch], sensitivity=True))
    packed, plain = profiles
    assert torch.equal(*(torch.as_tensor(profile.counts["default"]) for profile in profiles))
    assert packed.sensitivity["default"] == pytest.approx(plain.sensitivity["default"], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_the_sample_of_weights_tells_quantised_models_apart(quantiser: str) -> None:
    packed, _ = build_twins(quantiser)
    layout = find_sites(packed)
    first = weights_sample(packed, layout)
    assert weights_sample(build_twins(quantiser)[0], layout) == first
    assert weights_sample(build_twins(quantiser, seed=1)[0], layout) != first


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_block_coordinate_refuses_experts_that_it_cannot_move(quantiser: str, tokens: Tensor) -> None:
    packed, _ = build_twins(quantiser)
    batch: dict[str, Any] = {"input_ids": tokens, "labels": tokens}
    with pytest.raises(ConfigurationError, match=r"(?s)block-coordinate updates weights.*layers\.0\.mlp\.experts"):
        apportion.profile(packed, [batch], sensitivity="block-coordinate")


def _fp8_experts() -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8Experts

    config = OlmoeConfig(hidden_size=64, intermediate_size=64, num_experts=8)
    return FP8Experts(config, block_size=(32, 32))


def _mxfp4_experts() -> nn.Module:
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    return Mxfp4GptOssExperts(GptOssConfig(hidden_size=64, intermediate_size=64, num_local_experts=8))


def _gguf_experts() -> nn.Module:
    from transformers.integrations.gguf.utils import GgufExperts

    return GgufExperts(8, 256, 256, 12, 12, nn.SiLU())


def _bytes() -> nn.Module:
    experts = build_tiny("olmoe").model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.int8), requires_grad=False)
    return experts


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "FP8Experts": (_fp8_experts, r"load the model with quantization_config=FineGrainedFP8Config\(dequantize=True\)"),
    "Mxfp4GptOssExperts": (_mxfp4_experts, r"load the model with quantization_config=Mxfp4Config\(dequantize=True\)"),
    "GgufExperts": (_gguf_experts, r"load the model with quantization_config=GgufConfig\(dequantize=True\)"),
    "OlmoeExperts": (_bytes, "load the model without quantisation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_experts_without_a_reader_are_refused_by_name_and_nothing_changes(name: str, tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    plan = apportion.plan(apportion.profile(model, [{"input_ids": tokens}]), "hellora", hot=2, rank=2)
    make, fix = REFUSED[name]
    model.model.layers[1].mlp.experts = make()
    before = [(path, type(module)) for path, module in model.named_modules()]
    message = rf"(?s)cannot be read.*place: +model\.layers\.1\.mlp\.experts: {name}.*fix: +{fix}"
    for step in (find_sites, lambda model: apportion.apply(model, plan), lambda model: apportion.profile(model, [])):
        with pytest.raises(ConfigurationError, match=message):
            step(model)
    assert [(path, type(module)) for path, module in model.named_modules()] == before


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_a_form_is_recognised_from_shapes_alone(quantiser: str) -> None:
    packed, plain = build_twins(quantiser)
    one, other = (known_form(model.model.layers[0].mlp.experts) for model in (packed, plain))
    assert one == other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantiser", ["int8", "float8"])
def test_a_model_that_transformers_quantises_at_loading_fits_the_plan_of_its_checkpoint(
    quantiser: str, tokens: Tensor, tmp_path: Path
) -> None:
    plain = build_tiny("olmoe", **WIDTHS)
    plain.save_pretrained(tmp_path)
    plan = apportion.plan(apportion.profile(plain, [{"input_ids": tokens}]), "hellora", hot=2, rank=2)
    kind = TORCHAO[quantiser]
    experts = {rf"re:.*experts\.{name}": kind for name in ("gate_up_proj", "down_proj")}
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype="float32",
        quantization_config=TorchAoConfig(FqnToConfig({"_default": kind, **experts})),
        experts_implementation="eager",
    )
    assert not stacked_weight(packed.model.layers[0].mlp.experts, "down_proj").is_exact
    assert find_sites(packed) == find_sites(plain)
    apportion.profile(packed, [{"input_ids": tokens, "labels": tokens}], sensitivity=True)
    adapted = apportion.apply(packed, plan)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)
    with pytest.raises(ConfigurationError, match=r"(?s)cannot be merged.*layers\.0\."):
        adapted.merge_adapter()
