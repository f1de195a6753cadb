"""Adapted experts run inside their base module's own call, and leave its configuration as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation

import apportion
from apportion.adapters.hosts.experts import ExpertLora
from apportion.compat.transformers import is_dispatched
from apportion.experts.dispatch import enter, leave
from apportion.records.profile import Profile
from architectures import build
from tiny_models import build_tiny

ProfileOf = Callable[[nn.Module], Profile]


def _adapted(model: nn.Module, profile_of: ProfileOf) -> nn.Module:
    adapted = apportion.apply(model, apportion.plan(profile_of(model), "hellora", hot=2, rank=2))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


@pytest.mark.parametrize("registered", ["before attaching", "after attaching"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_hooks_on_the_base_experts_run_once_per_call(
    family: str, registered: str, profile_of: ProfileOf, tokens: Tensor
) -> None:
    model = build_tiny(family)
    calls: list[str] = []
    if registered == "before attaching":
        profile = profile_of(model)
        _note_calls(model.model.layers[-1].mlp.experts, calls)
        adapted = _adapted(model, lambda _: profile).train()
    else:
        adapted = _adapted(model, profile_of).train()
        _note_calls(adapted.get_base_model().model.layers[-1].mlp.experts.base_layer, calls)
    assert is_dispatched(adapted.get_base_model().model.layers[-1].mlp.experts.base_layer)
    for _ in range(2):
        calls.clear()
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        assert calls == ["before", "after", "backward"]
    with torch.no_grad(), adapted.disable_adapter():
        adapted(input_ids=tokens)
    assert calls[3:] == ["before", "after"]


def _note_calls(experts: nn.Module, calls: list[str]) -> None:
    experts.register_forward_pre_hook(lambda *_: calls.append("before"))
    experts.register_forward_hook(lambda *_: calls.append("after"))
    experts.register_full_backward_hook(lambda *_: calls.append("backward"))


@pytest.mark.parametrize("family", ["llama4", "dbrx"])
def test_experts_outside_the_registries_run_directly(family: str, profile_of: ProfileOf, tokens: Tensor) -> None:
    adapted = _adapted(build(family), profile_of)
    hosts = [module for module in adapted.modules() if isinstance(module, ExpertLora)]
    assert hosts
    assert not any(is_dispatched(host.base_layer) for host in hosts)
    calls: list[str] = []
    _note_calls(hosts[-1].base_layer, calls)
    with torch.no_grad():
        with adapted.disable_adapter():
            base = adapted(input_ids=tokens).logits
        assert calls == ["before", "after"]
        found = adapted(input_ids=tokens).logits
        assert calls == ["before", "after"]
        assert not torch.allclose(found, base, atol=1e-3)
        merged = adapted.merge_and_unload()
        assert torch.allclose(merged(input_ids=tokens).logits, found, atol=1e-5, rtol=0)


def test_experts_in_module_lists_are_called_layer_by_layer(profile_of: ProfileOf, tokens: Tensor) -> None:
    adapted = _adapted(build_tiny("listed"), profile_of)
    assert not any(isinstance(module, ExpertLora) for module in adapted.modules())
    layers = [module for path, module in adapted.named_modules() if path.endswith("base_layer") and ".experts." in path]
    assert layers
    calls = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = adapted(input_ids=tokens).logits
        assert len(calls) == len(layers)
        merged = adapted.merge_and_unload()
        assert torch.allclose(merged(input_ids=tokens).logits, found, atol=1e-4, rtol=0)


def test_two_adapted_models_may_share_a_configuration(profile_of: ProfileOf, tokens: Tensor) -> None:
    config = build_tiny("olmoe").config
    models = [AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    adapted = [_adapted(model, profile_of) for model in models]
    with torch.no_grad():
        expected = [model(input_ids=tokens).logits for model in adapted]
        plain = adapted[0].unload()
        assert all(layer.mlp.experts.config is config for layer in plain.model.layers)
        assert torch.equal(adapted[1](input_ids=tokens).logits, expected[1])
        assert not torch.allclose(plain(input_ids=tokens).logits, expected[0], atol=1e-3)


def test_models_that_share_a_configuration_keep_their_own_experts_function(
    profile_of: ProfileOf, tokens: Tensor
) -> None:
    config = build_tiny("olmoe").config
    one, other = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    other.load_state_dict(one.state_dict())
    adapted = _adapted(one, profile_of)
    assert other.config is config
    assert config._experts_implementation != "apportion"
    with torch.no_grad(), adapted.disable_adapter():
        assert torch.equal(adapted(input_ids=tokens).logits, other(input_ids=tokens).logits)


def test_a_function_chosen_later_runs_where_no_adapter_does(
    profile_of: ProfileOf, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny("olmoe")
    adapted = _adapted(model, profile_of)
    called = []
    eager = type(adapted.get_base_model().model.layers[0].mlp.experts.base_layer).forward
    monkeypatch.setattr(eager, "__wrapped__", _counting(eager.__wrapped__, called))
    with torch.no_grad(), adapted.disable_adapter():
        adapted(input_ids=tokens)
        assert not called
        model.set_experts_implementation("eager")
        adapted(input_ids=tokens)
    assert len(called) == model.config.num_hidden_layers


def _counting(function: Callable[..., Tensor], called: list[int]) -> Callable[..., Tensor]:
    def run(*args: object) -> Tensor:
        called.append(1)
        return function(*args)

    return run


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_the_configuration_is_given_back(how: str, profile_of: ProfileOf) -> None:
    adapted = _adapted(build_tiny("olmoe"), profile_of)
    plain = getattr(adapted, how)()
    assert all(layer.mlp.experts.config is plain.config for layer in plain.model.layers)


def test_copies_run_by_themselves(profile_of: ProfileOf, tokens: Tensor) -> None:
    adapted = _adapted(build_tiny("olmoe"), profile_of)
    twin = copy.deepcopy(adapted)
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits
        for parameter in adapted.parameters():
            parameter.zero_()
        assert torch.equal(twin(input_ids=tokens).logits, expected)
    assert twin.get_base_model().model.layers[0].mlp.experts.base_layer.config.config is twin.get_base_model().config


def test_a_bare_configuration_is_enough_for_a_model_without_weights(profile_of: ProfileOf) -> None:
    tiny = build_tiny("olmoe")
    plan = apportion.plan(profile_of(tiny), "hellora", hot=2, rank=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny.config.to_dict()))
    adapted = apportion.apply(model, plan)
    assert adapted.receipt.trainable_parameters == plan.cost.trainable_parameters


def test_fp8_experts_are_dispatched_by_their_own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    experts_class = type("Experts", (FP8Experts,), {})
    use_experts_implementation(experts_class, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    config = copy.deepcopy(build_tiny("olmoe").config)
    experts = experts_class(config, block_size=(8, 8))
    monkeypatch.setitem(ALL_FP8_EXPERTS_FUNCTIONS._global_mapping, "chosen", lambda *_: "the chosen function's output")
    config._experts_implementation_internal = "chosen"
    inputs = (torch.zeros(3, 32), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2))
    enter(experts)
    assert experts(*inputs, run_rows=lambda *_: "the adapted rows") == "the adapted rows"
    assert experts(*inputs) == "the chosen function's output"
    leave(experts)
    assert experts.config is config
