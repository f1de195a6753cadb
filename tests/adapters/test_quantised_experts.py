"""Adapters on quantised experts: equal to those on the dequantised twin, whose weights are never kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apportion
from adapted_experts import adapted_experts, gradients_of, routed_inputs
from apportion.adapters.hosts.experts import ExpertLora
from apportion.errors import ConfigurationError
from apportion.experts import dequantising
from apportion.experts.run import run_experts
from apportion.records.profile import Profile
from quantised_models import QUANTISERS, build_twins, dequantise, quantise
from tiny_models import checkpoint_activations

ProfileOf = Callable[[nn.Module], Profile]
PATHS = ["fused", "composed"]
FORMS = ["olmoe", "gpt_oss", "dbrx"]

pytestmark = pytest.mark.filterwarnings("ignore:.*was instantiated without:UserWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Products of a few rows wait for a second thread, far longer than they run on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def take_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give a function that makes all adapted experts run on one of the two paths."""

    def composed(self: ExpertLora, active: Any, hidden: Tensor, *routing: Tensor) -> Tensor:
        return run_experts(self.base_layer, hidden, *routing, partial(self.adapted_product, active))

    return lambda path: monkeypatch.setattr(ExpertLora, "_run_rows", composed) if path == "composed" else None


def adapt(model: nn.Module, profile: Profile) -> nn.Module:
    """Attach the same random adapters to a model and to its twin."""
    adapted = apportion.apply(model, apportion.plan(profile, "hellora", hot=4, rank=2))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted


def train(model: nn.Module, tokens: Tensor, steps: int = 10) -> list[float]:
    """Train the adapters, and return each step's loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_training_equals_that_of_the_dequantised_twin(
    quantiser: str, path: str, tokens: Tensor, profile_of: ProfileOf, take_path: Callable[[str], None]
) -> None:
    take_path(path)
    packed, plain = build_twins(quantiser)
    profile = profile_of(plain)
    assert profile_of(packed).layout == profile.layout
    packed, plain = adapt(packed, profile), adapt(plain, profile)
    losses = train(packed, tokens)
    assert losses == pytest.approx(train(plain, tokens), abs=1e-4)
    assert losses[-1] < losses[0] - 0.1
    factors = dict(plain.named_parameters())
    for name, parameter in packed.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter, factors[name], atol=1e-4), name


def packed_layers(name: str, quantiser: str) -> tuple[ExpertLora, ExpertLora]:
    """Adapt one layer of experts, quantised, and the same layer with the dequantised weights."""
    plain = adapted_experts(name, torch.float32)
    packed = copy.deepcopy(plain)
    quantise(packed.base_layer, packed.form.parameters, quantiser)
    dequantise(plain.base_layer, packed.base_layer)
    return packed, plain


@pytest.mark.parametrize("quantiser", ["nf4", "int8"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FORMS)
def test_outputs_and_gradients_equal_those_on_dequantised_weights_in_every_form(
    name: str, path: str, quantiser: str, take_path: Callable[[str], None]
) -> None:
    take_path(path)
    layers = packed_layers(name, quantiser)
    inputs = routed_inputs(layers[1], 20, torch.float32)
    results = []
    for layer in layers:
        out = layer(*inputs)
        trained = [*layer.lora_shape.parameters(), inputs[0], inputs[2]]
        with torch.no_grad():
            one = layer(*(tensor[:1] for tensor in inputs))
        results.append([out, layer(*inputs).detach(), one, *gradients_of(out, trained)])
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_no_dequantised_weight_is_kept_for_the_backward_pass(
    quantiser: str, path: str, take_path: Callable[[str], None]
) -> None:
    take_path(path)
    layers = packed_layers("olmoe", quantiser)
    inputs = routed_inputs(layers[1], 20, torch.float32)
    kept: list[dict[int, int]] = []
    for layer in layers:
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = layer(*inputs)
        kept.append(storages)
        out.sum().backward()
    of_packed, of_plain = (sum(storages.values()) for storages in kept)
    weights = sum(layers[1].base_layer.get_parameter(name).nbytes for name in layers[1].form.parameters)
    assert of_plain - of_packed == weights


def test_a_layer_is_dequantised_in_parts_below_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plain = packed_layers("olmoe", "nf4")
    inputs = routed_inputs(plain, 20, torch.float32)
    expected = run_experts(plain.base_layer, *inputs, partial(plain.adapted_product, ["default"]))
    size = max(plain.base_layer.get_parameter(name)[0].nbytes for name in plain.form.parameters)
    monkeypatch.setattr(dequantising, "BUDGET_BYTES", 2 * size)
    read: list[int] = []
    original = dequantising.StackedWeight.dense

    def dense(self: Any, experts: Any, dtype: torch.dtype) -> Tensor:
        found = original(self, experts, dtype)
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(dequantising.StackedWeight, "dense", dense)
    found = run_experts(packed.base_layer, *inputs, partial(packed.adapted_product, ["default"]))
    found.sum().backward()
    assert torch.allclose(found, expected, atol=1e-5)
    assert len(read) > 4
    assert max(read) <= 2 * size


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_merging_is_refused_by_name(quantiser: str, how: str, tokens: Tensor, profile_of: ProfileOf) -> None:
    packed, _ = build_twins(quantiser)
    adapted = adapt(packed, profile_of(packed))
    with torch.no_grad():
        before = adapted(input_ids=tokens).logits
    with pytest.raises(
        ConfigurationError, match=r"(?s)cannot be merged.*place: +.*layers\.0\.mlp\.experts\.gate_up_proj"
    ):
        getattr(adapted, how)()
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=tokens).logits, before)


@pytest.mark.parametrize("quantiser", ["nf4", "int8"])
def test_an_adapter_saved_and_loaded_is_the_same_on_both_twins(
    quantiser: str, tokens: Tensor, profile_of: ProfileOf, tmp_path: Path
) -> None:
    packed, plain = build_twins(quantiser)
    fresh = copy.deepcopy(packed)
    adapted = adapt(packed, profile_of(plain))
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits
        assert torch.equal(apportion.load(fresh, tmp_path)(input_ids=tokens).logits, expected)
        assert torch.allclose(apportion.load(plain, tmp_path)(input_ids=tokens).logits, expected, atol=1e-4)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_factors_are_in_the_type_that_is_computed_in(quantiser: str, profile_of: ProfileOf, tokens: Tensor) -> None:
    packed, plain = build_twins(quantiser, dtype=torch.bfloat16)
    adapted = apportion.apply(packed, apportion.plan(profile_of(plain), "hellora", hot=2, rank=2))
    experts = adapted.get_submodule("base_model.model.model.layers.0.mlp.experts")
    assert {factor.dtype for factor in experts.lora_shape.parameters()} <= {torch.float32, torch.bfloat16}
    assert {factor.device.type for factor in experts.lora_shape.parameters()} == {"cpu"}
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    assert all(bool(factor.grad.isfinite().all()) for factor in experts.lora_shape.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # newer versions of transformers have another name for it
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_gradient_checkpointing_changes_nothing(quantiser: str, profile_of: ProfileOf, tokens: Tensor) -> None:
    packed, _ = build_twins(quantiser)
    profile = profile_of(packed)
    losses = []
    for checkpointing in (False, True):
        model = adapt(copy.deepcopy(packed), profile).train()
        if checkpointing:
            checkpoint_activations(model)
            model.enable_input_require_grads()
        losses.append(train(model, tokens, steps=3))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
