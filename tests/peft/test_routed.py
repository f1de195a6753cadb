"""Routed LoRA on whole models: planned, attached, trained, saved, disabled, and never merged by mistake."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import apportion
from apportion.errors import ConfigurationError
from apportion.records.plan import Plan
from apportion.records.profile import Profile
from apportion.training.procedures.balance import BalanceLoss
from tiny_models import build_dense, build_tiny, checkpoint_activations


@pytest.fixture(params=["dense", "olmoe", "qwen2_moe"])
def model(request: pytest.FixtureRequest) -> Any:
    return build_dense() if request.param == "dense" else build_tiny(request.param)


def _profile(model: nn.Module, tokens: Tensor) -> Profile:
    batches = {f"t{row}": [{"input_ids": tokens[row : row + 1], "labels": tokens[row : row + 1]}] for row in range(4)}
    return apportion.profile(model, batches, sensitivity=True)


def _plan(model: nn.Module, tokens: Tensor, **options: Any) -> Plan:
    return apportion.plan(_profile(model, tokens), "lora_smoe", rank=4, **options)


def _shake(model: nn.Module) -> None:
    """Give B other values than zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def test_new_adapters_change_no_logit_and_exactly_they_train(model: Any, tokens: Tensor) -> None:
    before = model(input_ids=tokens).logits
    plan = _plan(model, tokens)
    assert {p.num_experts for p in plan.placements} > {1, 4}
    adapted = apportion.apply(model, plan)
    assert torch.equal(adapted(input_ids=tokens).logits, before)
    assert adapted.receipt.trainable_parameters == plan.cost.trainable_parameters
    start = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    adapted.train()
    for _ in range(3):
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        assert {name for name, parameter in adapted.named_parameters() if parameter.grad is not None} == trainable
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, start[name])}
    assert moved == trainable
    assert any("lora_router" in name for name in moved)


def test_saved_and_loaded_adapters_agree(model: Any, tokens: Tensor, tmp_path: Path) -> None:
    base = copy.deepcopy(model)
    adapted = apportion.apply(model, _plan(model, tokens)).eval()
    _shake(adapted)
    expected = adapted(input_ids=tokens).logits
    adapted.save_pretrained(tmp_path)
    loaded = apportion.load(base, tmp_path).eval()
    assert torch.equal(loaded(input_ids=tokens).logits, expected)
    with loaded.disable_adapter():
        assert torch.equal(loaded(input_ids=tokens).logits, loaded.get_base_model()(input_ids=tokens).logits)
    assert torch.equal(loaded(input_ids=tokens).logits, expected)


@pytest.mark.parametrize("first", ["lora_smoe", "attention"])
def test_adapters_of_both_kinds_share_a_layer(tokens: Tensor, first: str) -> None:
    model = build_dense()
    profile = _profile(model, tokens)
    plans = {
        "lora_smoe": apportion.plan(profile, "lora_smoe", rank=4),
        "attention": apportion.plan(profile, "attention", rank=2),
    }
    alone = {}
    for name, plan in plans.items():
        torch.manual_seed(0)
        adapted = apportion.apply(copy.deepcopy(model), plan)
        _shake(adapted)
        alone[name] = (adapted(input_ids=tokens).logits, peft.get_peft_model_state_dict(adapted))
    second = next(name for name in plans if name != first)
    both = apportion.apply(copy.deepcopy(model), plans[first], adapter_name=first)
    both = apportion.apply(both, plans[second], adapter_name=second)
    for name in plans:
        peft.set_peft_model_state_dict(both, alone[name][1], adapter_name=name)
    for name in plans:
        both.set_adapter(name)
        assert torch.allclose(both(input_ids=tokens).logits, alone[name][0], atol=1e-6)
    both.delete_adapter("lora_smoe")
    both.set_adapter("attention")
    assert torch.allclose(both.merge_and_unload()(input_ids=tokens).logits, alone["attention"][0], atol=1e-5)


def test_one_expert_is_peft_s_lora(tokens: Tensor) -> None:
    model = build_dense()
    plan = apportion.plan(apportion.profile(model, [{"input_ids": tokens}]), "uniform", rank=4, alpha=8, experts=1)
    assert plan.is_mergeable
    ours = apportion.apply(copy.deepcopy(model), plan)
    _shake(ours)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=8, target_modules=names))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits)


def test_gates_refuse_to_merge_before_anything_changes(tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    plan = _plan(model, tokens)
    assert not plan.is_mergeable
    adapted = apportion.apply(model, plan)
    _shake(adapted)
    before = adapted(input_ids=tokens).logits
    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(ConfigurationError, match=r"gates depend on the input[\s\S]*LoRA experts"):
            merge()
    assert torch.equal(adapted(input_ids=tokens).logits, before)
    assert adapted.unload()(input_ids=tokens).logits is not None


def test_gradient_checkpointing_changes_nothing(tokens: Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build_dense()
        adapted = apportion.apply(model, _plan(model, tokens))
        torch.manual_seed(0)
        _shake(adapted)
        if checkpointing:
            checkpoint_activations(adapted)
            adapted.enable_input_require_grads()
        adapted.train()
        balance = BalanceLoss(weight=0.5)
        balance.attach(adapted, "default", num_steps=1, seed=0)
        balance.before_forward({"input_ids": tokens})
        (adapted(input_ids=tokens, labels=tokens).loss + balance.penalty()).backward()
        balance.detach()
        gradients.append({name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6)


def test_mixed_types(tokens: Tensor) -> None:
    model = build_dense()
    plan = _plan(model, tokens)
    adapted = apportion.apply(model.bfloat16(), plan)
    assert {p.dtype for name, p in adapted.named_parameters() if "lora_" in name} == {torch.float32}
    out = adapted(input_ids=tokens, labels=tokens)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()


def test_a_balance_loss_needs_a_router(tokens: Tensor) -> None:
    model = build_dense()
    adapted = apportion.apply(model, apportion.plan(_profile(model, tokens), "attention", rank=2))
    with pytest.raises(ConfigurationError, match="no site with several LoRA experts"):
        BalanceLoss(weight=0.5).attach(adapted, "default", num_steps=1, seed=0)
