"""Batches whose rows use different adapters give every row what its own adapter alone gives it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import apportion
from apportion.errors import ConfigurationError
from apportion.records.profile import Profile
from architectures import build
from tiny_models import build_dense, build_tiny

ProfileOf = Callable[[nn.Module], Profile]


def _adapted(model: nn.Module, profile_of: ProfileOf, plans: dict[str, tuple[str, dict[str, object]]]) -> nn.Module:
    """Attach one adapter with random factors per plan; the last one is active."""
    measured = profile_of(model)
    adapted = model
    for name, (method, options) in plans.items():
        adapted = apportion.apply(adapted, apportion.plan(measured, method, rank=2, **options), adapter_name=name)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.set_adapter(list(plans)[-1])
    return adapted.eval()


def _check_rows(adapted: nn.Module, tokens: Tensor, names: list[str]) -> None:
    """Compare a mixed batch with one batch per adapter."""
    batch = tokens[:1].repeat(len(names), 1)
    with torch.no_grad():
        mixed = adapted(input_ids=batch, adapter_names=names).logits
        alone = {}
        for name in set(names):
            if name == "__base__":
                with adapted.disable_adapter():
                    alone[name] = adapted(input_ids=batch).logits
            else:
                adapted.set_adapter(name)
                alone[name] = adapted(input_ids=batch).logits
    distinct = list(alone.values())
    assert all(not torch.allclose(one, two) for one, two in itertools.pairwise(distinct))
    for row, name in enumerate(names):
        assert torch.allclose(mixed[row], alone[name][row], atol=1e-5), (row, name)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_rows_with_adapters_on_experts_routers_and_attention(
    family: str, profile_of: ProfileOf, tokens: Tensor
) -> None:
    plans = {"one": ("hellora", {"hot": 2}), "two": ("hellora", {"hot": 1, "targets": ["experts", "router"]})}
    adapted = _adapted(build_tiny(family), profile_of, plans)
    _check_rows(adapted, tokens, ["one", "two", "__base__", "two", "one"])


def test_rows_of_a_family_that_calls_its_experts_with_copies(profile_of: ProfileOf) -> None:
    model = build("llama4")
    tokens = torch.randint(3, model.config.vocab_size, (2, 7))
    plans = {"one": ("hellora", {"hot": 2}), "two": ("cold", {"hot": 1})}
    _check_rows(_adapted(model, profile_of, plans), tokens, ["two", "__base__", "one"])


def test_rows_with_routed_and_sparse_adapters(profile_of: ProfileOf, tokens: Tensor) -> None:
    plans = {
        "one": ("uniform", {"experts": "2"}),
        "two": ("lori", {"targets": ["attention"]}),
        "three": ("attention", {}),
    }
    adapted = _adapted(build_dense(), profile_of, plans)
    _check_rows(adapted, tokens, ["three", "one", "two", "__base__"])


def test_rows_agree_with_stock_peft(profile_of: ProfileOf, tokens: Tensor) -> None:
    model = build_tiny("olmoe")
    stock = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]), "one")
    stock.add_adapter("two", LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    plans = {name: ("attention", {"targets": ["attention.q"]}) for name in ("one", "two")}
    ours = _adapted(model, profile_of, plans)
    theirs = {name: parameter for name, parameter in stock.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_" in name:
                theirs[name].copy_(parameter)
        batch = {"input_ids": tokens[:1].repeat(3, 1), "adapter_names": ["two", "__base__", "one"]}
        assert torch.allclose(ours(**batch).logits, stock.eval()(**batch).logits, atol=1e-6)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_uses_each_rows_adapter(beams: int, profile_of: ProfileOf, tokens: Tensor) -> None:
    plans = {"one": ("hellora", {"hot": 2}), "two": ("hellora", {"hot": 1, "targets": ["experts"]})}
    adapted = _adapted(build_tiny("olmoe"), profile_of, plans)
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    batch = tokens[:1].repeat(3, 1)
    mixed = adapted.generate(input_ids=batch, adapter_names=["one", "__base__", "two"], **settings)
    for row, name in enumerate(["one", None, "two"]):
        if name is None:
            with adapted.disable_adapter():
                alone = adapted.generate(input_ids=batch[:1], **settings)
        else:
            adapted.set_adapter(name)
            alone = adapted.generate(input_ids=batch[:1], **settings)
        assert torch.equal(mixed[row], alone[0])


def test_what_cannot_be_mixed_is_refused(profile_of: ProfileOf, tokens: Tensor) -> None:
    plans = {"one": ("hellora", {"hot": 2}), "two": ("hellora", {"hot": 1})}
    adapted = _adapted(build_tiny("olmoe"), profile_of, plans)
    with pytest.raises(ConfigurationError, match="there is no adapter 'other'"):
        adapted(input_ids=tokens, adapter_names=["other"] * len(tokens))
    for count in (len(tokens) // 2, len(tokens) + 1):
        with pytest.raises(ConfigurationError, match=f"adapter_names has {count} names, but the batch has 6 rows"):
            adapted(input_ids=tokens, adapter_names=["one"] * count)
    with pytest.raises(ConfigurationError, match="in training"):
        adapted.train()(input_ids=tokens, adapter_names=["one"] * len(tokens))
    adapted.eval().merge_adapter(["one"])
    with pytest.raises(ValueError, match="merged"):
        adapted(input_ids=tokens, adapter_names=["two"] * len(tokens))


def test_rows_without_an_adapter_on_experts_in_a_list(profile_of: ProfileOf, tokens: Tensor) -> None:
    plans = {"one": ("lora", {"targets": ["router"]}), "two": ("hellora", {"hot": 2})}
    adapted = _adapted(build_tiny("listed"), profile_of, plans)
    batch = tokens[:1].repeat(3, 1)
    with torch.no_grad():
        mixed = adapted(input_ids=batch, adapter_names=["one", "__base__", "one"]).logits
        adapted.set_adapter("one")
        assert torch.allclose(mixed[0], adapted(input_ids=batch).logits[0], atol=1e-5)
        with adapted.disable_adapter():
            assert torch.allclose(mixed[1], adapted(input_ids=batch).logits[1], atol=1e-5)


def test_experts_in_a_list_are_refused_since_they_see_tokens_without_rows(
    profile_of: ProfileOf, tokens: Tensor
) -> None:
    adapted = _adapted(build_tiny("listed"), profile_of, {"one": ("hellora", {"hot": 2})})
    with pytest.raises(ConfigurationError, match=r"receives tokens without their rows.\n  place:  .*experts"):
        adapted(input_ids=tokens, adapter_names=["one"] * len(tokens))


def test_merged_experts_are_refused_with_a_way_out(profile_of: ProfileOf, tokens: Tensor) -> None:
    plans = {name: ("hellora", {"hot": 2, "targets": ["experts"]}) for name in ("one", "two")}
    adapted = _adapted(build_tiny("olmoe"), profile_of, plans)
    adapted.merge_adapter(["one"])
    with pytest.raises(ConfigurationError, match="while adapters are merged") as caught:
        adapted(input_ids=tokens, adapter_names=["two"] * len(tokens))
    assert caught.value.fix == "call unmerge_adapter first"
