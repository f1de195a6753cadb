"""MELoRA on whole models: linear layers, routers and stacked experts, from the plan to stock PEFT."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import apportion
from apportion.adapters.hosts.experts import ExpertLora
from apportion.errors import ConfigurationError, PlanError
from apportion.peft.site_factors import site_factors
from apportion.records.shapes.blocks import Blocks
from tiny_models import build_dense, build_tiny

LINEAR = ("attention", "shared", "dense")


def _plan(model: nn.Module, tokens: Tensor, method: str = "melora", **options: object) -> apportion.Plan:
    profile = apportion.profile(model, [{"input_ids": tokens}])
    return apportion.plan(profile, method, rank=2, alpha=6, **options)


def _shaken(model: nn.Module, plan: apportion.Plan) -> PeftModel:
    """Attach the plan, with a random B."""
    adapted = apportion.apply(copy.deepcopy(model), plan).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "dense"])
@torch.no_grad()
def test_merged_saved_and_loaded_it_gives_the_same_logits(name: str, tokens: Tensor, tmp_path: Path) -> None:
    model = build_dense() if name == "dense" else build_tiny(name)
    adapted = _shaken(model, _plan(model, tokens, blocks=2))
    expected = adapted(input_ids=tokens).logits
    assert not torch.allclose(model(input_ids=tokens).logits, expected, atol=1e-3)
    adapted.save_pretrained(tmp_path)
    loaded = apportion.load(copy.deepcopy(model), tmp_path).eval()
    assert torch.equal(loaded(input_ids=tokens).logits, expected)
    assert torch.allclose(loaded.merge_and_unload()(input_ids=tokens).logits, expected, atol=1e-4)


def test_stacked_experts_run_and_train_as_dense_matrices(tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    adapted = _shaken(model, _plan(model, tokens, targets="experts"))
    layers = [module for module in adapted.modules() if isinstance(module, ExpertLora)]
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 6 * len(layers)  # stacked over the experts: A and B of three projections
    found = adapted(input_ids=tokens).logits
    gradients = torch.autograd.grad(found.square().sum(), trained)
    for layer in layers:
        stacked = {name: layer.base_layer.get_parameter(name).detach() for name in layer.form.parameters}
        for name in layer.form.projections:
            parameter = layer.form.projections[name].parameter
            whole = torch.zeros_like(stacked[parameter])
            for expert, delta in layer.lora_shape["default"].weight_deltas(name):
                layer.form.view(whole, name)[expert] = delta
            stacked[parameter] = stacked[parameter] + whole
        layer.forward = lambda *inputs, base=layer.base_layer, stacked=stacked: torch.func.functional_call(
            base, stacked, inputs
        )
    dense = adapted(input_ids=tokens).logits
    assert torch.allclose(found, dense, atol=1e-5)
    for one, other in zip(gradients, torch.autograd.grad(dense.square().sum(), trained), strict=True):
        assert torch.allclose(one, other, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_an_export_loads_in_stock_peft_with_equal_logits(tokens: Tensor, tmp_path: Path) -> None:
    model = build_dense()
    model.save_pretrained(tmp_path / "base")
    adapted = _shaken(model, _plan(model, tokens, blocks=4))
    adapted.save_pretrained(tmp_path / "adapter")
    apportion.export(tmp_path / "adapter", tmp_path / "plain", model=tmp_path / "base")
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "plain").eval()
    assert type(theirs.base_model).__name__ == "LoraModel"
    assert torch.allclose(theirs(input_ids=tokens).logits, adapted(input_ids=tokens).logits, atol=1e-5)


@torch.no_grad()
def test_one_block_is_lora_of_the_same_seed(tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    blocks = _shaken(model, _plan(model, tokens, blocks=1))
    lora = _shaken(model, _plan(model, tokens, "lora"))
    pairs = [{site: (a, b) for site, a, b in site_factors(adapted, "default")} for adapted in (blocks, lora)]
    assert pairs[0].keys() == pairs[1].keys()
    assert all(torch.equal(pairs[0][site][0], a) for site, (a, _) in pairs[1].items())
    for site, (_, b) in pairs[1].items():
        b.copy_(pairs[0][site][1])
    assert torch.equal(blocks(input_ids=tokens).logits, lora(input_ids=tokens).logits)


def test_counts_are_those_of_lora(tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    costs = [_plan(model, tokens, blocks=blocks).cost for blocks in (1, 2, 4)]
    lora = _plan(model, tokens, "lora").cost
    assert {cost.trainable_parameters for cost in costs} == {lora.trainable_parameters}
    adapted = apportion.apply(model, _plan(model, tokens, blocks=4))
    assert adapted.receipt.trainable_parameters == lora.trainable_parameters


def test_the_published_count() -> None:
    """RoBERTa-base has 12 layers of width 768; q and v with rank 8 have 294,912 parameters, with rank 1 36,864."""

    for rank, expected in ((8, 294_912), (1, 36_864)):
        for blocks in (1, 8):
            parts = Blocks(rank, 16.0, blocks).parts(768, 768)
            assert 24 * sum(part.entries for part in parts) == expected


@torch.no_grad()
def test_adapters_of_other_shapes_combine_and_share_a_layer(tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    adapted = _shaken(model, _plan(model, tokens))
    expected = adapted(input_ids=tokens).logits
    adapted = apportion.apply(adapted, _plan(model, tokens, "hellora", hot=2), adapter_name="other").eval()
    assert torch.equal(adapted(input_ids=tokens).logits, expected)
    adapted.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    adapted.set_adapter("both")
    assert torch.allclose(adapted(input_ids=tokens).logits, expected, atol=1e-5)


def test_what_cannot_be_is_refused(tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    with pytest.raises(PlanError, match=r"cannot be cut into 3 equal blocks.*\n  place:"):
        _plan(model, tokens, blocks=3)
    with pytest.raises(ConfigurationError, match="blocks"):
        _plan(model, tokens, blocks=0)
    with pytest.raises(ConfigurationError, match="trains all of its blocks"):
        _plan(model, tokens, sparsity=0.5)
