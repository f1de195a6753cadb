"""Routers with LoRA: their own weight is never touched, whoever calls them, and torch.compile takes them whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from apportion.adapters.hosts.weight import WeightLora
from apportion.adapters.shapes.low_rank import low_rank
from apportion.discovery import find_sites
from tiny_models import build_tiny


def _router() -> WeightLora:
    """Adapt a tiny model's router."""
    model = build_tiny("olmoe").requires_grad_(False)
    name = next(site.name for site in find_sites(model).sites() if site.kind == "router")
    layer = WeightLora(model.get_submodule(name))
    layer.add_adapter("default", low_rank(layer.place(), rank=2, scale=2.0))
    nn.init.normal_(layer.lora_shape["default"].lora_A.weight)
    layer.set_adapter("default")
    nn.init.normal_(layer.lora_shape["default"].lora_B.weight)
    return layer


def test_compiles_whole_with_the_same_gradients() -> None:
    layer = _router()
    hidden = torch.randn(5, layer.weight.shape[1])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    a, b = layer.lora_shape["default"].lora_A.weight, layer.lora_shape["default"].lora_B.weight
    found, expected = (torch.autograd.grad(run(hidden)[1].square().sum(), (a, b)) for run in (compiled, layer))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
        assert one.any()


def test_a_failed_call_leaves_the_router_its_weight() -> None:
    layer = _router()
    own = layer.base_layer.weight
    before = own.clone()
    with pytest.raises(RuntimeError):
        layer(torch.randn(5, layer.weight.shape[1] + 1))
    assert layer.base_layer.weight is own
    assert torch.equal(own, before)


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Have Python switch threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("frequent_switches")
def test_four_threads_share_a_router_without_wrong_results() -> None:
    layer = _router()
    hidden = torch.randn(5, layer.weight.shape[1])
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        expected = layer(hidden)[0]
        assert not torch.allclose(expected, layer.base_layer(hidden)[0])
        with ThreadPoolExecutor(4) as pool:
            wrong = sum(pool.map(lambda _: not torch.equal(layer(hidden)[0], expected), range(1000)))
    assert wrong == 0
    assert torch.equal(layer.base_layer.weight, before)


def test_a_view_of_the_weight_in_the_modules_dictionary_is_adapted() -> None:
    """FSDP1 leaves its view of a weight there, where it shadows the module's parameter."""
    layer = _router()
    hidden = torch.randn(5, layer.weight.shape[1])
    expected = layer(hidden)[0]
    vars(layer.base_layer)["weight"] = layer.base_layer.weight.data.view(layer.base_layer.weight.shape)
    assert torch.equal(layer(hidden)[0], expected)
    layer(hidden)[0].sum().backward()
    assert layer.lora_shape["default"].lora_B.weight.grad.any()


def test_a_router_with_accelerates_hook_is_adapted() -> None:
    layer = _router()
    hidden = torch.randn(5, layer.weight.shape[1])
    expected = layer(hidden)[0]
    add_hook_to_module(layer.base_layer, AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(layer(hidden)[0], expected)


def test_a_router_whose_forward_was_replaced_is_adapted_or_refused() -> None:
    layer = _router()
    hidden = torch.randn(5, layer.weight.shape[1])
    expected = layer(hidden)[0]
    layer.base_layer.forward = MethodType(type(layer.base_layer).forward, layer.base_layer)
    assert torch.equal(layer(hidden)[0], expected)
    layer.base_layer.forward = lambda x: x
    with pytest.raises(TypeError, match="was given a forward of its own"):
        layer(hidden)


def test_hooks_on_the_base_router_run_once_per_call() -> None:
    layer = _router()
    calls = []
    layer.base_layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.base_layer.register_forward_hook(lambda *_: calls.append("after"))
    layer(torch.randn(5, layer.weight.shape[1]))
    assert calls == ["before", "after"]
