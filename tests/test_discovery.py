"""Sites: names, kinds, shapes, and a fingerprint that tells architectures apart."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from apportion.discovery import find_sites
from apportion.errors import ConfigurationError
from architectures import REFUSED, build, build_refused
from tiny_models import build_dense, build_tiny


def test_names_are_those_of_servers(tiny_model: nn.Module) -> None:
    layout = find_sites(tiny_model)
    names = set(layout.by_name)
    assert "model.layers.0.self_attn.q_proj" in names
    assert "model.layers.1.mlp.gate" in names
    assert "model.layers.0.mlp.experts.5.gate_proj" in names
    assert "lm_head" not in names
    assert len(names) == 2 * (4 + 1 + 8 * 3)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("olmoe", {"attention": 8, "router": 2, "experts": 48}),
        ("mixtral", {"attention": 8, "router": 2, "experts": 24}),
        ("qwen2_moe", {"attention": 8, "router": 2, "experts": 36, "shared": 6}),
        ("deepseek_v3", {"attention": 15, "router": 2, "experts": 48, "shared": 6, "dense": 3}),
        ("gpt_oss", {"attention": 8, "router": 2, "experts": 24}),
        ("listed", {"attention": 2, "router": 2, "experts": 36}),
    ],
)
def test_kinds(name: str, kinds: dict[str, int]) -> None:
    assert Counter(site.kind for site in find_sites(build_tiny(name)).sites()) == kinds


def test_shapes_are_the_matrices_own(any_model: nn.Module) -> None:
    layout = find_sites(any_model)
    total = sum(site.in_features * site.out_features for site in layout.sites())
    matrices = sum(
        parameter.numel()
        for name, parameter in any_model.named_parameters()
        if parameter.ndim > 1
        and not any(part in name for part in ("embed", "lm_head", "_bias", "shared_expert_gate", "sinks"))
    )
    assert total == matrices


def test_top_k_is_known(any_model: nn.Module) -> None:
    assert {block.top_k for block in find_sites(any_model).blocks} == {2}


@pytest.mark.parametrize("name", ["olmoe", "listed"])
def test_a_model_that_does_not_say_its_top_k_is_refused(name: str) -> None:
    model = build_tiny(name)
    vars(model.config)["num_experts_per_tok"] = None
    for module in model.modules():
        vars(module).pop("top_k", None)
    place = r"place:\s+.*layers\.0\.mlp\.experts"
    with pytest.raises(ConfigurationError, match=rf"number of experts per token.*\n.*{place}.*\n.*num_experts_per_tok"):
        find_sites(model)
    model.config.num_experts_per_tok = 3
    assert {block.top_k for block in find_sites(model).blocks} == {3}


def test_a_model_on_the_meta_device_is_the_same() -> None:
    real = find_sites(build_tiny("olmoe"))
    assert find_sites(build_tiny("olmoe").to("meta")) == real


def test_fingerprints_tell_architectures_apart() -> None:
    prints = [find_sites(build_tiny("olmoe", seed=seed)).fingerprint for seed in (0, 1)]
    assert prints[0] == prints[1]
    assert find_sites(build_tiny("olmoe", vocab_size=80)).fingerprint != prints[0]
    assert find_sites(build_tiny("mixtral")).fingerprint != prints[0]


def test_base_parameters_are_counted_once() -> None:
    tied = build_tiny("olmoe", tie_word_embeddings=True)
    assert find_sites(tied).base_parameters == sum(parameter.numel() for parameter in tied.parameters())


def test_dense_models_have_no_experts() -> None:
    layout = find_sites(build_dense())
    assert not layout.is_moe
    assert Counter(site.kind for site in layout.sites()) == {"attention": 8, "dense": 6}


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot be adapted"):
        find_sites(nn.Sequential(nn.Linear(2, 2), nn.Embedding(2, 2)))


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_experts_in_another_form_are_refused_by_name(model_type: str) -> None:
    with pytest.raises(ConfigurationError, match=f"in a form that is not supported.*\n.*{REFUSED[model_type][1]}"):
        find_sites(build_refused(model_type))


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_omni_moe", "muse_spark", "ernie4_5_vl_moe", "mistral_large4"])
def test_sites_are_in_the_language_model_alone(name: str) -> None:
    model = build(name)
    layout = find_sites(model)
    assert layout.is_moe
    assert all(".language_model.layers." in site.name and "vision" not in site.name for site in layout.sites())
    assert layout.base_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_every_layer_of_a_router_is_a_router() -> None:
    sites = [site for site in find_sites(build("zaya")).others if site.kind == "router"]
    assert [site.projection for site in sites] == ["down", "fc1", "fc2", "out"] * 2
    assert all(".mlp.gate." in site.name for site in sites)


def test_a_router_with_rows_for_shared_experts_is_a_router() -> None:
    sites = [site for site in find_sites(build("inkling")).others if site.kind == "router"]
    assert [(site.out_features, site.storage) for site in sites] == [(9, "weight")] * 2


def test_linear_layers_that_compute_something_else_are_adapted_through_their_weight() -> None:
    sites = find_sites(build("deepseek_v4")).by_name
    assert sites["model.layers.0.self_attn.o_a_proj"].storage == "weight"
    assert sites["model.layers.0.self_attn.o_b_proj"].storage == "linear"


def test_layouts_survive_json(any_model: nn.Module) -> None:
    layout = find_sites(any_model)
    assert type(layout).from_dict(layout.as_dict()) == layout
    assert torch.is_grad_enabled()
