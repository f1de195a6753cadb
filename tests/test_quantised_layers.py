"""Quantised linear layers: sites and fingerprint of the model that they were made from, and PEFT's own LoRA layers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, Int8WeightOnlyConfig, quantize_

import apportion
from apportion.discovery import find_sites
from apportion.errors import ConfigurationError
from apportion.records.site import Layout
from tiny_models import build_dense, build_tiny

FINGERPRINTS = {
    "olmoe": "a0d84ef048fc89e5db905221f06b7f427d75070728ba2c762836a6532fee4b30",
    "gpt_oss": "58bb45452dd1f6808cfc293fc82bc58e5d905cdd6f577a6cd9a1064c8bc32485",
    "listed": "93b96dcc2f17d2a275dd339c269e058ad0b0e59815a386fe193f0c1d70b3451c",
    "deepseek_v3": "d833b2955b768612ced88c92468d156f3c4d55181525219e9cf6e0fea7754978",
}


class Packed(nn.Module):
    """Weights in buffers of another shape, as GPTQ and AWQ have them: no `weight`, a bias that is a buffer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().t().contiguous().view(torch.int32))
        self.register_buffer("scales", torch.ones(2, linear.out_features))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.view(torch.float32).t(), self.bias)


class PackedLinear(nn.Linear):
    """A flat weight and parameters of its own in an `nn.Linear`, as bitsandbytes and FP8 layers have them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.bias = linear.bias
        self.weight = nn.Parameter(linear.weight.detach().view(torch.uint8).reshape(-1, 1), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(-1).view(torch.float32).view(self.out_features, self.in_features)
        return nn.functional.linear(x, weight, self.bias)


def quantised(model: nn.Module, layer: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Copy a model, and replace every plain linear layer but the last one of all."""
    twin = copy.deepcopy(model)
    for path, module in list(twin.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in path:
            parent, _, name = path.rpartition(".")
            holder = twin.get_submodule(parent)
            if isinstance(holder, nn.ModuleDict):
                holder[name] = layer(module)
            else:
                setattr(holder, name, layer(module))
    return twin


@pytest.mark.parametrize("name", sorted(FINGERPRINTS))
def test_fingerprints_of_plain_models_stay(name: str) -> None:
    assert find_sites(build_tiny(name)).fingerprint == FINGERPRINTS[name]


def test_the_embedded_models_fingerprint_stays(embedded_model: tuple[nn.Module, object]) -> None:
    layout = find_sites(embedded_model[0])
    assert layout.fingerprint == "455a13dddad2b0e2a6be8be41fdb84e1a4f3864bc292e5b952e278502159fb9f"
    assert layout.base_parameters == 4930752


@pytest.mark.parametrize("layer", [Packed, PackedLinear])
def test_a_quantised_twin_has_the_layout_of_its_model(any_model: nn.Module, layer: Callable[..., nn.Module]) -> None:
    assert find_sites(quantised(any_model, layer)) == find_sites(any_model)


@pytest.mark.parametrize("layer", [Packed, PackedLinear])
def test_a_dense_quantised_twin_has_the_layout_of_its_model(layer: Callable[..., nn.Module]) -> None:
    assert find_sites(quantised(build_dense(), layer)) == find_sites(build_dense())


def test_a_quantised_router_is_a_router() -> None:
    model = build_tiny("qwen2_moe")
    layout = find_sites(model)
    gate = next(site.name for site in layout.others if site.kind == "router")
    twin = copy.deepcopy(model)
    own = model.get_submodule(gate)
    linear = nn.Linear(own.weight.shape[1], own.weight.shape[0], bias=False)
    parent, _, name = gate.rpartition(".")
    setattr(twin.get_submodule(parent), name, Packed(linear))
    found = find_sites(twin)
    assert found.fingerprint == layout.fingerprint
    assert found.by_name[gate].kind == "router"
    assert found.by_name[gate].storage == "linear"


def test_a_layer_with_adapters_has_the_layout_of_its_quantised_base(tokens: Tensor) -> None:
    twin = quantised(build_tiny("olmoe"), PackedLinear)
    before = find_sites(twin)
    profile = apportion.profile(twin, [{"input_ids": tokens}])
    plan = apportion.plan(profile, "hellora", hot=2, rank=2)
    adapted = apportion.apply(twin, plan)
    assert find_sites(adapted) == before
    assert adapted.receipt.frozen_parameters == before.base_parameters


def test_a_plan_of_a_model_fits_its_quantised_twin(tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    plan = apportion.plan(apportion.profile(model, [{"input_ids": tokens}]), "hellora", hot=2, rank=2)
    twin = quantised(model, PackedLinear)
    expected = model(input_ids=tokens).logits
    adapted = apportion.apply(twin, plan)
    assert adapted.receipt.trainable_parameters == plan.cost.trainable_parameters
    assert torch.allclose(adapted(input_ids=tokens).logits, expected, atol=1e-5)


class _Projection(nn.Module):
    """A layer of a model's own that only looks like a quantised one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_features = self.out_features = width
        self.weight = nn.Parameter(torch.randn(width, width))


class _Holder(nn.Module):
    """A wrapper that says how wide the layer is that it holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_features = self.out_features = width
        self.inner = nn.Linear(width, width)


def _with_layer(layer: nn.Module) -> Layout:
    model = build_dense()
    model.get_submodule("model.layers.0.self_attn").extra = layer
    return find_sites(model)


def test_layers_that_only_name_their_widths_are_no_sites() -> None:
    plain = {site.name for site in find_sites(build_dense()).others}
    assert {site.name for site in _with_layer(_Projection(32)).others} == plain
    assert {site.name for site in _with_layer(_Holder(32)).others} - plain == {"model.layers.0.self_attn.extra.inner"}
    own = type("Packed", (Packed,), {"__module__": "transformers_modules.some.modeling_some"})
    assert {site.name for site in _with_layer(own(nn.Linear(32, 32))).others} == plain
    grouped = type("PackedGroupedLinear", (PackedLinear,), {})
    assert {site.name for site in _with_layer(grouped(nn.Linear(32, 32))).others} == plain


def test_block_coordinate_refuses_weights_that_it_cannot_move(tokens: Tensor) -> None:
    twin = quantised(build_tiny("olmoe"), PackedLinear)
    batch: dict[str, Any] = {"input_ids": tokens, "labels": tokens}
    with pytest.raises(ConfigurationError, match=r"(?s)block-coordinate updates weights.*self_attn.*one-pass"):
        apportion.profile(twin, [batch], sensitivity="block-coordinate")


def four_bits(linear: nn.Linear) -> nn.Module:
    has_bias = linear.bias is not None
    layer = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, has_bias, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def eight_bits(linear: nn.Linear) -> nn.Module:
    has_bias = linear.bias is not None
    layer = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, has_bias, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def by_torchao(config: Any, linear: nn.Linear) -> nn.Module:
    layer = copy.deepcopy(linear).requires_grad_(False)
    quantize_(layer, config)
    return layer


# The layer, the class of PEFT that adapts it, and what transformers sets on a model that it loads so.
QUANTISED: dict[str, tuple[Callable[[nn.Linear], nn.Module], str, str | None]] = {
    "bitsandbytes, 4 bits": (four_bits, "peft.tuners.lora.bnb.Linear4bit", "is_loaded_in_4bit"),
    "bitsandbytes, 8 bits": (eight_bits, "peft.tuners.lora.bnb.Linear8bitLt", "is_loaded_in_8bit"),
    "torchao, int8": (
        partial(by_torchao, Int8WeightOnlyConfig()),
        "peft.tuners.lora.torchao.TorchaoLoraLinear",
        None,
    ),
    "torchao, float8": (
        partial(by_torchao, Float8WeightOnlyConfig()),
        "peft.tuners.lora.torchao.TorchaoLoraLinear",
        None,
    ),
    "GPTQ": (Packed, "peft.tuners.lora.gptq.GPTQLoraLinear", None),
    "AWQ": (Packed, "peft.tuners.lora.awq.AwqLoraLinear", None),
}


def known_to_peft(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PEFT take the stand-in for a layer of GPTQModel, which needs a GPU to be installed."""
    qlinear = ModuleType("gptqmodel.nn_modules.qlinear")
    qlinear.BaseQuantLinear = Packed if name == "GPTQ" else type(None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gptqmodel.nn_modules.qlinear", qlinear)
    for module in ("gptq", "awq"):
        monkeypatch.setattr(f"peft.tuners.lora.{module}.is_gptqmodel_available", lambda: True)
    monkeypatch.setattr(
        "peft.tuners.lora.awq.is_gptqmodel_awq_layer", lambda layer: name == "AWQ" and isinstance(layer, Packed)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUANTISED)
def test_a_plan_of_a_model_trains_its_quantised_twin_by_pefts_own_layers(
    name: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    layer, layer_class, flag = QUANTISED[name]
    model = build_tiny("olmoe", hidden_size=64, intermediate_size=64)
    plan = apportion.plan(apportion.profile(model, [{"input_ids": tokens}]), "hellora", hot=2, rank=2)
    twin = quantised(model, layer)
    if flag:
        setattr(twin, flag, True)
    if layer is Packed:
        known_to_peft(name, monkeypatch)
    with torch.no_grad():
        expected = twin(input_ids=tokens).logits  # packs the weights, where that was still to be done
    assert find_sites(twin) == find_sites(model)
    adapted = apportion.apply(twin, plan)
    assert adapted.receipt.trainable_parameters == plan.cost.trainable_parameters
    adapter = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert f"{type(adapter).__module__}.{type(adapter).__name__}" == layer_class
    assert (adapter.in_features, adapter.out_features) == (64, 64)
    with torch.no_grad():
        assert torch.allclose(adapted(input_ids=tokens).logits, expected, atol=1e-5)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    with pytest.raises(ConfigurationError, match=r"(?s)cannot be merged.*layers\.0\.self_attn\.q_proj\.weight"):
        adapted.merge_adapter()


def _last(model: nn.Module, replace: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.o_proj = replace(attention.o_proj)
    return model


def test_a_layer_that_peft_does_not_know_is_refused_before_anything_changes(tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    plan = apportion.plan(apportion.profile(model, [{"input_ids": tokens}]), "hellora", hot=2, rank=2)
    twin = _last(copy.deepcopy(model), Packed)
    before = [(path, type(module)) for path, module in twin.named_modules()]
    message = r"(?s)PEFT has no LoRA layer.*place: +model\.layers\.1\.self_attn\.o_proj.*found: +Packed.*fix: +load"
    with pytest.raises(ConfigurationError, match=message):
        apportion.apply(twin, plan)
    assert [(path, type(module)) for path, module in twin.named_modules()] == before


def test_a_router_whose_weight_is_quantised_is_refused(tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    plan = apportion.plan(apportion.profile(model, [{"input_ids": tokens}]), "hellora", hot=2, rank=2)
    quantize_(
        model.requires_grad_(False), FqnToConfig({"model.layers.1.mlp.gate.weight": Int8WeightOnlyConfig()}), None
    )
    message = r"(?s)plain floating-point weight.*place: +model\.layers\.1\.mlp\.gate.*its weight a Int8Tensor"
    with pytest.raises(ConfigurationError, match=message):
        apportion.apply(model, plan)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_sparse_adapters_of_ours_stand_on_packed_layers_too(tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    plan = apportion.plan(apportion.profile(model, [{"input_ids": tokens}]), "lori", rank=2)
    adapted = [apportion.apply(one, plan) for one in (quantised(model, Packed), model)]
    losses = [one(input_ids=tokens, labels=tokens).loss for one in adapted]
    assert torch.allclose(*losses, atol=1e-5)
    losses[0].backward()
    assert all(parameter.grad is not None for parameter in adapted[0].parameters() if parameter.requires_grad)
