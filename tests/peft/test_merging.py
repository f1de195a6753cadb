"""Merging writes to plain floating-point weights, and refuses all others by name before anything changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import apportion
from apportion.errors import ConfigurationError
from apportion.records.profile import Profile
from tiny_models import build_dense, build_tiny

ProfileOf = Callable[[nn.Module], Profile]


class _Dequantised(nn.Module):
    """Stands for a quantiser's parametrisation: reading the weight makes a new tensor."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored.to(torch.float32)


class _QuantisedWeight(nn.Parameter):
    """Stands for the parameter classes of quantisers."""


def _parametrised(layer: nn.Module) -> str:
    parametrize.register_parametrization(layer.mlp.experts.base_layer, "down_proj", _Dequantised())
    return "mlp.experts.down_proj"


def _quantised(layer: nn.Module) -> str:
    projection = layer.self_attn.q_proj.base_layer
    projection.weight = _QuantisedWeight(projection.weight.data, requires_grad=False)
    return "self_attn.q_proj.weight"


def _offloaded(layer: nn.Module) -> str:
    router = layer.mlp.gate.base_layer
    router.weight = nn.Parameter(router.weight.to("meta"), requires_grad=False)
    return "mlp.gate.weight"


def _adapted(profile_of: ProfileOf) -> nn.Module:
    """Attach random adapters to a tiny model."""
    model = build_tiny("olmoe")
    adapted = apportion.apply(model, apportion.plan(profile_of(model), "hellora", hot=8, rank=2))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return adapted


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("change", [_parametrised, _quantised, _offloaded])
def test_weights_that_merging_would_not_change_are_refused(
    change: Callable[[nn.Module], str], how: str, profile_of: ProfileOf
) -> None:
    adapted = _adapted(profile_of)
    place = change(adapted.get_base_model().model.layers[1])
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items() if not tensor.is_meta}
    with pytest.raises(
        ConfigurationError, match=f"cannot be merged: a weight.*\n  place:  .*layers.1.{place}\n  fix: "
    ):
        getattr(adapted, how)()
    after = adapted.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_merge_that_fails_leaves_a_model_that_runs(profile_of: ProfileOf, tokens: Tensor) -> None:
    adapted = _adapted(profile_of).eval()
    expected = adapted(input_ids=tokens).logits
    factor = adapted.get_base_model().model.layers[1].mlp.experts.lora_shape["default"].low_rank.lora_B["up_proj"]
    before = factor.detach().clone()
    factor.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs"):
        adapted.merge_and_unload(safe_merge=True)
    factor.data.copy_(before)
    adapted.unmerge_adapter()
    assert torch.allclose(
        adapted(input_ids=tokens).logits, expected, atol=1e-3
    )  # merging rounds, and the random factors are large


def test_an_adapter_beside_a_merged_one_counts_it_once(profile_of: ProfileOf, tokens: Tensor) -> None:
    model = build_dense()
    profile = profile_of(model)
    adapted = apportion.apply(model, apportion.plan(profile, "attention", rank=2))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    expected = adapted.eval()(input_ids=tokens).logits
    adapted.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):  # PEFT's own words
        apportion.apply(adapted, apportion.plan(profile, "uniform", experts=2, rank=2), adapter_name="other")
    assert torch.allclose(adapted.eval()(input_ids=tokens).logits, expected, atol=1e-4)


@pytest.mark.parametrize("change", [_parametrised, _offloaded])
def test_a_single_layer_refuses_too(change: Callable[[nn.Module], str], profile_of: ProfileOf) -> None:
    layer = _adapted(profile_of).get_base_model().model.layers[1]
    place = change(layer)
    with pytest.raises(ValueError, match=f"cannot be merged: {place.rpartition('.')[2]} is"):
        layer.get_submodule(place.rpartition(".")[0]).merge()
