"""Stacked experts with LoRA: equal to transformers' own forward pass with merged weights, in every form and type."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from adapted_experts import adapted_experts, gradients_of, routed_inputs, run_merged
from apportion.experts.run import run_experts

FORMS = ["olmoe", "gpt_oss", "openai_privacy_filter", "nemotron_h", "dbrx"]


@pytest.mark.parametrize("planned", [{}, {"every": True}, {"alike": True}], ids=["some", "every", "alike"])
@pytest.mark.parametrize("path", ["fused", "composed"])
@pytest.mark.parametrize("name", FORMS)
def test_equals_the_models_own_experts_with_merged_weights(name: str, path: str, planned: dict[str, bool]) -> None:
    layer = adapted_experts(name, **planned)
    hidden, ids, weights = routed_inputs(layer, tokens=20)
    trained = [*layer.lora_shape.parameters(), hidden, weights]
    if path == "fused":
        found = layer(hidden, ids, weights)
    else:
        found = run_experts(layer.base_layer, hidden, ids, weights, partial(layer.adapted_product, ["default"]))
    expected = run_merged(layer, hidden, ids, weights)
    tolerance = 1e-4 if name == "openai_privacy_filter" else 1e-9  # its own forward pass is in float32, whatever comes
    assert torch.allclose(found, expected, atol=tolerance)
    for one, other in zip(gradients_of(found, trained), gradients_of(expected, trained), strict=True):
        assert torch.allclose(one, other, atol=tolerance)
    with torch.no_grad():
        assert torch.allclose(layer(hidden, ids, weights), expected, atol=tolerance)


@pytest.mark.parametrize("planned", [{}, {"every": True}, {"alike": True}], ids=["some", "every", "alike"])
@pytest.mark.parametrize("name", FORMS)
def test_one_token_alone_equals_merged_weights_too(name: str, planned: dict[str, bool]) -> None:
    layer = adapted_experts(name, **planned)
    tolerance = 1e-4 if name == "openai_privacy_filter" else 1e-9
    for _ in range(4):  # other experts every time
        hidden, ids, weights = (tensor.detach() for tensor in routed_inputs(layer, tokens=1))
        with torch.no_grad():
            assert torch.allclose(layer(hidden, ids, weights), run_merged(layer, hidden, ids, weights), atol=tolerance)


@pytest.mark.parametrize("alike", [False, True])
def test_compiles_with_the_graph_breaks_of_the_base(alike: bool) -> None:
    layer = adapted_experts("olmoe", torch.float32, alike=alike)
    hidden, ids, weights = routed_inputs(layer, dtype=torch.float32)
    breaks = [
        torch._dynamo.explain(module)(hidden, ids, weights).graph_break_count for module in (layer.base_layer, layer)
    ]
    assert breaks[0] == breaks[1] == 0
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    trained = [*layer.lora_shape.parameters(), hidden, weights]
    found, expected = compiled(hidden, ids, weights), layer(hidden, ids, weights)
    assert torch.allclose(found, expected, atol=1e-5)
    for one, other in zip(gradients_of(found, trained), gradients_of(expected, trained), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
