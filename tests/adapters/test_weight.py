"""Routers with LoRA: their own weight is theirs again after every call, and torch.compile takes them whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apportion.adapters.weight import WeightLora
from apportion.discovery import find_sites
from tiny_models import build_tiny


def _router() -> WeightLora:
    """Adapt a tiny model's router."""
    model = build_tiny("olmoe").requires_grad_(False)
    name = next(site.name for site in find_sites(model).sites() if site.kind == "router")
    layer = WeightLora(model.get_submodule(name))
    layer.add_adapter("default", rank=2, scale=2.0)
    layer.set_adapter("default")
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def test_compiles_whole_with_the_same_gradients() -> None:
    layer = _router()
    hidden = torch.randn(5, layer.weight.shape[1])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
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
