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
from apportion.experts.dispatch import enter, is_dispatched, leave
from apportion.records.profile import Profile
from tiny_models import build_tiny

ProfileOf = Callable[[nn.Module], Profile]


def _adapted(model: nn.Module, profile_of: ProfileOf) -> nn.Module:
    adapted = apportion.apply(model, apportion.plan(profile_of(model), "hellora", hot=2, rank=2))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_hooks_on_the_base_experts_run_once_per_call(family: str, profile_of: ProfileOf, tokens: Tensor) -> None:
    adapted = _adapted(build_tiny(family), profile_of).train()
    experts = adapted.get_base_model().model.layers[-1].mlp.experts
    assert is_dispatched(experts.base_layer)
    calls = []
    experts.base_layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    experts.base_layer.register_forward_hook(lambda *_: calls.append("after"))
    experts.base_layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    assert calls == ["before", "after", "backward"]
    with torch.no_grad(), adapted.disable_adapter():
        adapted(input_ids=tokens)
    assert calls[3:] == ["before", "after"]


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
