"""The activation's closed form equals autograd's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adapted_experts import adapted_experts, gradients_of, routed_inputs


def test_swiglu_in_closed_form_is_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = adapted_experts("olmoe", torch.float32)
    assert layer.form.is_swiglu
    assert not adapted_experts("gpt_oss").form.is_swiglu
    inputs = routed_inputs(layer, tokens=20, dtype=torch.float32)
    trained = [*layer.lora_shape.parameters(), inputs[0], inputs[2]]
    closed = gradients_of(layer(*inputs), trained)
    monkeypatch.setattr(layer, "form", replace(layer.form, is_swiglu=False))
    for one, other in zip(closed, gradients_of(layer(*inputs), trained), strict=True):
        assert torch.equal(one, other)
