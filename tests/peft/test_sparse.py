"""Frozen A and sparse B on whole models: counted, trained, saved and loaded at the kept share."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import apportion
from apportion.counting import count
from apportion.discovery import find_sites
from apportion.errors import ApportionWarning, ConfigurationError, PlanError
from apportion.peft.attach import PhaseOptions
from apportion.peft.masks import random_mask
from apportion.peft.site_factors import site_factors
from apportion.records.mask import Mask, load_mask
from apportion.records.profile import Profile
from tiny_models import build_dense, build_tiny, checkpoint_activations

ProfileOf = Callable[[nn.Module], Profile]


def _model(name: str) -> Any:
    return build_dense() if name == "dense" else build_tiny(name)


def _plan(model: nn.Module, profile_of: ProfileOf, **options: Any) -> apportion.Plan:
    method = "hellori" if find_sites(model).is_moe else "lori"
    hot = {"hot": 2} if method == "hellori" else {}
    return apportion.plan(profile_of(model), method, rank=4, **hot, **options)


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    return {site: a.clone() for site, a, _ in site_factors(model, "default")}


def _train(model: nn.Module, tokens: Tensor, steps: int = 4) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.numel() > 1)
    assert state == 2 * sum(parameter.numel() for parameter in trainable)


@pytest.mark.parametrize("name", ["dense", "olmoe", "deepseek_v3", "gpt_oss", "listed"])
def test_only_what_is_kept_trains_and_is_stored(
    name: str, profile_of: ProfileOf, tokens: Tensor, tmp_path: Path
) -> None:
    model = _model(name)
    base, layout = copy.deepcopy(model), find_sites(model)
    plan = _plan(model, profile_of)
    entries = sum(p.total_rank * layout.by_name[p.site].out_features for p in plan.placements)
    assert plan.cost.trainable_parameters == -(-entries // 10)
    before = model(input_ids=tokens).logits
    adapted = apportion.apply(model, plan)
    assert torch.allclose(adapted(input_ids=tokens).logits, before, atol=1e-5)
    before_a = _frozen(adapted)
    _train(adapted, tokens)
    assert all(torch.equal(a, before_a[site]) for site, a in _frozen(adapted).items())
    assert not torch.allclose(adapted(input_ids=tokens).logits, before, atol=1e-4)

    expected = adapted(input_ids=tokens).logits
    adapted.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    values = sum(t.numel() for key, t in stored.items() if key.endswith(".values"))
    assert values == plan.cost.stored_parameters
    assert sum(t.numel() for key, t in stored.items() if key.endswith(".indices")) == plan.cost.stored_indices
    assert {key.rpartition(".")[2] for key in stored} == {"values", "indices"}
    sites = {key.removeprefix("base_model.model.").rpartition(".lora_B.")[0] for key in stored}
    assert sites == {placement.site for placement in plan.placements}
    loaded = apportion.load(base, tmp_path)
    assert torch.equal(loaded(input_ids=tokens).logits, expected)
    merged = adapted.merge_and_unload()
    assert torch.allclose(merged(input_ids=tokens).logits, expected, atol=1e-5)


def test_a_stored_a_is_read_back(profile_of: ProfileOf, tokens: Tensor, tmp_path: Path) -> None:
    model = build_tiny("olmoe")
    base = copy.deepcopy(model)
    adapted = apportion.apply(model, _plan(model, profile_of), phase=PhaseOptions(store_a=True))
    _train(adapted, tokens)
    adapted.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    changed = {key: value * 2 if "lora_A" in key else value for key, value in stored.items()}
    assert any("lora_A" in key for key in stored)
    same = apportion.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(same(input_ids=tokens).logits, adapted(input_ids=tokens).logits)
    save_file(changed, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"tensor_digests": None}))
    with pytest.warns(ApportionWarning, match="has no digests"):
        other = apportion.load(base, tmp_path)
    assert not torch.allclose(other(input_ids=tokens).logits, adapted(input_ids=tokens).logits)


def test_another_draw_is_refused(profile_of: ProfileOf, tmp_path: Path) -> None:
    model = build_tiny("olmoe")
    base = copy.deepcopy(model)
    apportion.apply(model, _plan(model, profile_of), seed=3).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_seed": 3', '"init_seed": 4'))
    with pytest.raises(ConfigurationError, match="--store-a"):
        apportion.load(base, tmp_path)


def test_all_of_b_trains_to_find_the_mask(profile_of: ProfileOf, tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    layout = find_sites(model)
    plan = _plan(model, profile_of)
    adapted = apportion.apply(model, plan, phase=PhaseOptions(dense_b=True))
    entries = sum(p.total_rank * layout.by_name[p.site].out_features for p in plan.placements)
    assert adapted.receipt.trainable_parameters == entries
    before_a = _frozen(adapted)
    _train(adapted, tokens)
    assert all(torch.equal(a, before_a[site]) for site, a in _frozen(adapted).items())


def test_masks_must_fit(profile_of: ProfileOf, tmp_path: Path) -> None:
    model = build_tiny("olmoe")
    layout = find_sites(model)
    plan = _plan(model, profile_of)
    mask = random_mask(plan.placements, layout.by_name, seed=0)
    assert mask.num_kept == count(plan.placements, layout.by_name).indices
    mask.save(tmp_path / "mask.safetensors")
    read = load_mask(tmp_path / "mask.safetensors")
    assert read.overlap(mask)["jaccard"] == 1.0
    other = random_mask(plan.placements, layout.by_name, seed=1).overlap(mask)
    assert other["jaccard"] < 0.3
    assert other["by_chance"] == pytest.approx(0.1, abs=0.01)
    for wrong, message in (
        (Mask({}, {}), "other sites or shapes"),
        (random_mask(_plan(model, profile_of, sparsity=0.5).placements, layout.by_name, 0), "keeps"),
        (Mask(mask.indices, mask.shapes, "0" * 64), "a different A"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            apportion.apply(model, plan, mask=wrong)
        assert not any("lora_" in name for name, _ in model.named_modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
    (tmp_path / "bad").write_bytes(b"no mask")
    for path in (tmp_path / "bad", tmp_path / "none"):
        with pytest.raises(PlanError, match="mask"):
            load_mask(path)


def test_what_sparse_plans_alone_have_is_refused_for_others(profile_of: ProfileOf) -> None:
    model = build_tiny("olmoe")
    sparse, whole = _plan(model, profile_of), apportion.plan(profile_of(model), "attention", rank=2)
    mask = random_mask(sparse.placements, find_sites(model).by_name, 0)
    wrong: tuple[dict[str, Any], ...] = (
        {"mask": mask},
        {"phase": PhaseOptions(dense_b=True)},
        {"phase": PhaseOptions(store_a=True)},
    )
    for arguments in wrong:
        with pytest.raises(ConfigurationError, match="not sparse"):
            apportion.apply(model, whole, **arguments)
    with pytest.raises(ConfigurationError, match="both given"):
        apportion.apply(model, sparse, mask=mask, phase=PhaseOptions(dense_b=True))


def test_loading_with_little_memory_is_refused(profile_of: ProfileOf, tmp_path: Path) -> None:
    model = build_tiny("olmoe")
    base = copy.deepcopy(model)
    apportion.apply(model, _plan(model, profile_of)).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="low_cpu_mem_usage"):
        apportion.load(base, tmp_path, low_cpu_mem_usage=True)


def test_loading_again_keeps_the_parameters_that_an_optimizer_knows(profile_of: ProfileOf, tmp_path: Path) -> None:
    model = build_tiny("olmoe")
    adapted = apportion.apply(model, _plan(model, profile_of))
    before = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    set_peft_model_state_dict(adapted, get_peft_model_state_dict(adapted))
    after = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


def test_gradient_checkpointing_changes_nothing(profile_of: ProfileOf, tokens: Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build_tiny("olmoe")
        adapted = apportion.apply(model, _plan(model, profile_of)).train()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.05)
        if checkpointing:
            checkpoint_activations(adapted)
            adapted.enable_input_require_grads()
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradient, gradients[1][name], atol=1e-6) for name, gradient in gradients[0].items())


@pytest.mark.parametrize("name", ["dense", "olmoe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_reaches_every_kept_entry(
    name: str, dtype: torch.dtype, profile_of: ProfileOf, tokens: Tensor
) -> None:
    model = _model(name)
    adapted = apportion.apply(model.to(dtype), _plan(model, profile_of)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = adapted(input_ids=tokens, labels=tokens).loss
    loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in trained)
    assert any(bool(p.grad.any()) for p in trained if p.grad is not None)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_sparsity_is_a_share(profile_of: ProfileOf, sparsity: float) -> None:
    with pytest.raises(ConfigurationError, match="sparsity"):
        apportion.plan(profile_of(build_tiny("olmoe")), "hellori", hot=2, rank=4, sparsity=sparsity)


def test_the_published_count() -> None:
    cost = apportion.cost("olmoe-1b-7b", "hellori", hot=8, rank=32)
    assert cost.trainable_parameters == cost.stored_parameters == 2_100_429
    assert round(cost.lora_count_ratio, 5) == 0.00674


def test_sparse_factors_compose_with_routed_experts(tokens: Tensor, tmp_path: Path) -> None:
    model = build_dense()
    base = copy.deepcopy(model)
    plan = apportion.plan(apportion.profile(model, [{"input_ids": tokens}]), "uniform", experts=3, rank=4, sparsity=0.8)
    adapted = apportion.apply(model, plan)
    _train(adapted, tokens)
    adapted.save_pretrained(tmp_path)
    loaded = apportion.load(base, tmp_path)
    assert torch.equal(loaded(input_ids=tokens).logits, adapted(input_ids=tokens).logits)


DRAW = """
import torch
from apportion.peft.start import draw_frozen
from apportion.records.plan import load_plan
from apportion.records.profile import load_profile
import sys

print(draw_frozen(load_plan(sys.argv[1]), load_profile(sys.argv[2]).layout.by_name, 0).checksum)
"""


def test_every_processor_draws_the_same_a(profile_of: ProfileOf, tmp_path: Path) -> None:
    model = build_tiny("olmoe")
    profile_of(model).save(tmp_path / "p.safetensors")
    _plan(model, profile_of).save(tmp_path / "plan.json")
    command = [sys.executable, "-c", DRAW, str(tmp_path / "plan.json"), str(tmp_path / "p.safetensors")]
    drawn = {
        capability: subprocess.run(
            command, env=os.environ | {"ATEN_CPU_CAPABILITY": capability}, check=True, capture_output=True, text=True
        ).stdout
        for capability in ("default", "avx2")
    }
    assert drawn["default"] == drawn["avx2"]


def test_the_draw_is_that_of_pytorchs_uniform(profile_of: ProfileOf) -> None:
    model = build_tiny("olmoe")
    adapted = apportion.apply(model, _plan(model, profile_of), phase=PhaseOptions(store_a=True))
    for name, tensor in adapted.state_dict().items():
        if name.endswith("q_proj.lora_shape.default.lora_A.weight"):
            site = name.removeprefix("base_model.model.").removesuffix(".lora_shape.default.lora_A.weight")
            digest = hashlib.sha256(f"0/{site}".encode()).digest()[:7]
            generator = torch.Generator().manual_seed(int.from_bytes(digest))
            bound = 1 / math.sqrt(tensor.shape[1])
            expected = torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator)
            assert torch.allclose(tensor, expected, atol=1e-7, rtol=0)
