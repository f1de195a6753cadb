"""`apply`: exactly what is planned is attached, trains, merges, saves and loads."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import apportion
from apportion.errors import ConfigurationError, PlanMismatchError
from apportion.records.plan import Plan
from apportion.records.profile import Profile
from tiny_models import build_dense, build_tiny, checkpoint_activations

ProfileOf = Callable[[nn.Module], Profile]


def _plan(model: nn.Module, profile_of: ProfileOf, method: str = "hellora", **options: object) -> Plan:
    options = {"rank": 4, **options} if method in ("lora", "attention") else {"hot": 2, "rank": 4, **options}
    return apportion.plan(profile_of(model), method, **options)


def _train(model: nn.Module, tokens: Tensor, steps: int = 3) -> None:
    """Take a few steps that are large enough to move every factor visibly."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def test_zero_initialised_adapters_change_no_logit(any_model: nn.Module, profile_of: ProfileOf, tokens: Tensor) -> None:
    before = _logits(any_model, tokens)
    adapted = apportion.apply(any_model, _plan(any_model, profile_of))
    assert torch.allclose(_logits(adapted, tokens), before, atol=1e-5, rtol=0)


def test_layers_without_planned_experts_are_bit_identical(
    tiny_model: nn.Module, profile_of: ProfileOf, tokens: Tensor
) -> None:
    before = _logits(tiny_model, tokens)
    adapted = apportion.apply(tiny_model, _plan(tiny_model, profile_of, "attention"))
    assert torch.equal(_logits(adapted, tokens), before)


@pytest.mark.parametrize("method", ["hellora", "lora"])
def test_exactly_the_planned_tensors_move(
    any_model: nn.Module, profile_of: ProfileOf, tokens: Tensor, method: str
) -> None:
    plan = _plan(any_model, profile_of, method)
    adapted = apportion.apply(any_model, plan)
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    _train(adapted, tokens)
    moved = {name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, before[name])}
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert moved == trainable
    assert sum(before[name].numel() for name in moved) == plan.cost.trainable_parameters


def test_every_planned_expert_moves(
    tiny_model: nn.Module, profile_of: ProfileOf, tokens: Tensor, tmp_path: Path
) -> None:
    plan = _plan(tiny_model, profile_of)
    adapted = apportion.apply(tiny_model, plan)
    adapted.save_pretrained(tmp_path / "before")
    _train(adapted, tokens)
    adapted.save_pretrained(tmp_path / "after")
    before = load_file(tmp_path / "before" / "adapter_model.safetensors")
    after = load_file(tmp_path / "after" / "adapter_model.safetensors")
    assert set(before) == {f"base_model.model.{p.site}.lora_{side}.weight" for p in plan.placements for side in "AB"}
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_merged_equals_unmerged(any_model: nn.Module, profile_of: ProfileOf, tokens: Tensor) -> None:
    adapted = apportion.apply(any_model, _plan(any_model, profile_of))
    _train(adapted, tokens)
    expected = _logits(adapted, tokens)
    atol = 5e-6 * float(expected.abs().max())
    adapted.merge_adapter()
    assert torch.allclose(_logits(adapted, tokens), expected, atol=atol, rtol=0)
    adapted.unmerge_adapter()
    assert torch.allclose(_logits(adapted, tokens), expected, atol=atol, rtol=0)
    merged = adapted.merge_and_unload()
    assert type(merged) is type(any_model)
    assert torch.allclose(_logits(merged, tokens), expected, atol=atol, rtol=0)


def test_saved_and_loaded_is_identical(
    any_model: nn.Module, profile_of: ProfileOf, tokens: Tensor, tmp_path: Path
) -> None:
    base = copy.deepcopy(any_model)
    adapted = apportion.apply(any_model, _plan(any_model, profile_of))
    _train(adapted, tokens)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(_logits(loaded, tokens), _logits(adapted, tokens))
    again = apportion.load(copy.deepcopy(loaded.unload()), tmp_path)
    assert torch.equal(_logits(again, tokens), _logits(adapted, tokens))


def test_disabled_adapters_give_the_base(any_model: nn.Module, profile_of: ProfileOf, tokens: Tensor) -> None:
    before = _logits(any_model, tokens)
    adapted = apportion.apply(any_model, _plan(any_model, profile_of))
    _train(adapted, tokens)
    assert not torch.equal(_logits(adapted, tokens), before)
    with adapted.disable_adapter():
        assert torch.equal(_logits(adapted, tokens), before)


def test_adapters_with_different_experts_share_a_model(
    tiny_model: nn.Module, profile_of: ProfileOf, tokens: Tensor, tmp_path: Path
) -> None:
    profile = profile_of(tiny_model)
    base = copy.deepcopy(tiny_model)
    hot = apportion.plan(profile, "hellora", hot=2, rank=4)
    cold = apportion.plan(profile, "cold", hot=3, rank=2)
    adapted = apportion.apply(tiny_model, hot, adapter_name="hot")
    _train(adapted, tokens)
    with_hot = _logits(adapted, tokens)
    apportion.apply(adapted, cold, adapter_name="cold")
    assert torch.equal(_logits(adapted, tokens), with_hot)
    adapted.set_adapter("cold")
    _train(adapted, tokens)
    with_cold = _logits(adapted, tokens)
    adapted.set_adapter("hot")
    assert torch.equal(_logits(adapted, tokens), with_hot)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path / "hot", adapter_name="hot")
    loaded.load_adapter(tmp_path / "cold", adapter_name="cold")
    assert torch.equal(_logits(loaded, tokens), with_hot)
    loaded.set_adapter("cold")
    assert torch.equal(_logits(loaded, tokens), with_cold)
    loaded.set_adapter("hot")
    loaded.delete_adapter("cold")
    assert torch.equal(_logits(loaded, tokens), with_hot)


def test_gradient_checkpointing_gives_the_same_gradients(
    tiny_model: nn.Module, profile_of: ProfileOf, tokens: Tensor
) -> None:
    adapted = apportion.apply(tiny_model, _plan(tiny_model, profile_of))
    _train(adapted, tokens)
    adapted.train()
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    expected = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    checkpoint_activations(adapted)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    found = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_a_bfloat16_base_trains_float32_adapters(profile_of: ProfileOf, tokens: Tensor) -> None:
    model = build_tiny("olmoe").to(torch.bfloat16)
    before = _logits(model, tokens)
    adapted = apportion.apply(model, _plan(model, profile_of))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert _logits(adapted, tokens).dtype == torch.bfloat16
    assert torch.allclose(_logits(adapted, tokens).float(), before.float(), atol=2e-2)
    _train(adapted, tokens)
    assert not torch.equal(_logits(adapted, tokens), before)


def test_autocast_runs(tiny_model: nn.Module, profile_of: ProfileOf, tokens: Tensor) -> None:
    adapted = apportion.apply(tiny_model, _plan(tiny_model, profile_of))
    _train(adapted, tokens)
    for some in (tokens, tokens[:1, :1]):
        with torch.autocast("cpu", torch.bfloat16):
            found = _logits(adapted, some)
        assert torch.allclose(found.float(), _logits(adapted, some), atol=0.1)


def test_dropout_acts_in_training_alone(tiny_model: nn.Module, profile_of: ProfileOf, tokens: Tensor) -> None:
    adapted = apportion.apply(tiny_model, _plan(tiny_model, profile_of), dropout=0.5)
    _train(adapted, tokens)
    assert torch.equal(_logits(adapted, tokens), _logits(adapted, tokens))
    adapted.train()
    assert not torch.equal(_logits(adapted, tokens), _logits(adapted, tokens))


def test_plans_that_share_a_site_start_it_alike(profile_of: ProfileOf, tmp_path: Path) -> None:
    started = {}
    for method in ("hellora", "lora"):
        model = build_tiny("olmoe")
        apportion.apply(model, _plan(model, profile_of, method), seed=3).save_pretrained(tmp_path / method)
        started[method] = load_file(tmp_path / method / "adapter_model.safetensors")
    assert all(torch.equal(value, started["lora"][name]) for name, value in started["hellora"].items())


def test_seeds_start_factors_differently(profile_of: ProfileOf) -> None:
    weights = []
    for seed in (0, 0, 1):
        model = build_tiny("olmoe")
        adapted = apportion.apply(model, _plan(model, profile_of), seed=seed)
        weights.append(torch.cat([p.flatten() for p in adapted.parameters() if p.requires_grad]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_receipt_accounts_for_every_site(tiny_model: nn.Module, profile_of: ProfileOf) -> None:
    plan = _plan(tiny_model, profile_of)
    adapted = apportion.apply(tiny_model, plan)
    assert adapted.receipt.sites_by_kind == {"attention": 8, "router": 2, "experts": 12}
    assert adapted.receipt.trainable_parameters == plan.cost.trainable_parameters
    trainable, total = adapted.get_nb_trainable_parameters()
    assert (adapted.receipt.trainable_parameters, adapted.receipt.frozen_parameters) == (trainable, total - trainable)
    assert "8 attention, 2 router, 12 experts" in str(adapted.receipt)


def test_checkpoints_are_as_small_as_their_parameters(profile_of: ProfileOf, tmp_path: Path) -> None:
    sizes, counts = {}, {}
    for method in ("hellora", "lora"):
        model = build_tiny("olmoe", hidden_size=128, intermediate_size=64)
        plan = _plan(model, profile_of, method, rank=8)
        apportion.apply(model, plan).save_pretrained(tmp_path / method)
        tensors = load_file(tmp_path / method / "adapter_model.safetensors")
        sizes[method] = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        counts[method] = plan.cost.trainable_parameters
        assert sizes[method] == plan.cost.checkpoint_bytes
    assert sizes["hellora"] / sizes["lora"] == pytest.approx(counts["hellora"] / counts["lora"], rel=0.05)


def test_a_plan_for_another_model_changes_nothing(tiny_model: nn.Module, profile_of: ProfileOf) -> None:
    other = build_tiny("olmoe", num_experts=4)
    plan = _plan(tiny_model, profile_of, "lora")
    names = [name for name, _ in other.named_modules()]
    with pytest.raises(PlanMismatchError, match="24 adapters that this model has no place for"):
        apportion.apply(other, plan)
    assert [name for name, _ in other.named_modules()] == names
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_a_plan_for_other_shapes_is_refused(tiny_model: nn.Module, profile_of: ProfileOf) -> None:
    with pytest.raises(PlanMismatchError, match="another architecture"):
        apportion.apply(build_tiny("olmoe", vocab_size=80), _plan(tiny_model, profile_of))


def test_an_adapter_for_another_model_is_refused(tiny_model: nn.Module, profile_of: ProfileOf, tmp_path: Path) -> None:
    apportion.apply(tiny_model, _plan(tiny_model, profile_of)).save_pretrained(tmp_path)
    with pytest.raises(PlanMismatchError):
        apportion.load(build_tiny("olmoe", num_experts=4), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"adapter_name": "a.b"}, "is not a valid adapter name"), ({"dropout": 1.0}, "out of range")],
)
def test_wrong_arguments_are_refused(
    tiny_model: nn.Module, profile_of: ProfileOf, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        apportion.apply(tiny_model, _plan(tiny_model, profile_of), **arguments)


def test_a_name_is_taken_once(tiny_model: nn.Module, profile_of: ProfileOf) -> None:
    plan = _plan(tiny_model, profile_of)
    adapted = apportion.apply(tiny_model, plan)
    with pytest.raises(ConfigurationError, match="already has an adapter 'default'"):
        apportion.apply(adapted, plan)


def test_a_dense_model_takes_lora(tokens: Tensor, profile_of: ProfileOf) -> None:
    model = build_dense()
    before = _logits(model, tokens)
    adapted = apportion.apply(model, apportion.plan(profile_of(model), "lora", rank=4))
    assert adapted.receipt.sites_by_kind == {"attention": 8, "dense": 6}
    assert torch.equal(_logits(adapted, tokens), before)


def test_threads_that_share_a_model_get_right_logits(profile_of: ProfileOf, tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    adapted = apportion.apply(model, _plan(model, profile_of))
    _train(adapted, tokens)
    expected = _logits(adapted, tokens)
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            wrong = sum(pool.map(lambda _: not torch.equal(_logits(adapted, tokens), expected), range(100)))
    finally:
        sys.setswitchinterval(interval)
    assert wrong == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in adapted.named_parameters())
