"""Site names are taken apart and put together in one way."""

from __future__ import annotations

import pytest
from torch import nn

from apportion.discovery import find_sites
from apportion.records.site_name import SiteName
from architectures import build
from tiny_models import build_tiny


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "listed"])
def test_names_of_a_models_sites_say_what_its_layout_says(family: str) -> None:
    check_names(build_tiny(family))


@pytest.mark.parametrize("family", ["dbrx", "llama4", "jamba", "nemotron_h", "granitemoe", "gemma4"])
def test_names_where_experts_have_other_places(family: str) -> None:
    check_names(build(family))


def check_names(model: nn.Module) -> None:
    """Compare every site's name with what discovery knows of the site."""
    layout = find_sites(model)
    blocks = {block.name for block in layout.blocks}
    for site in layout.sites():
        name = SiteName.parse(site.name)
        assert str(name) == site.name
        assert name.expert == site.expert
        assert name.is_expert == (site.kind == "experts")
        assert (name.module in blocks) == name.is_expert
        assert name.layer == site.layer


@pytest.mark.parametrize(
    ("text", "below"),
    [
        ("model.layers.3.mlp.experts.5.gate_proj", "mlp.experts.*.gate_proj"),
        ("model.layers.0.self_attn.q_proj", "self_attn.q_proj"),
        ("transformer.blocks.11.ffn.experts.0.down_proj", "ffn.experts.*.down_proj"),
        ("model.layers.2.mlp.shared_experts.up_proj", "mlp.shared_experts.up_proj"),
        ("lm_head", "lm_head"),
    ],
)
def test_names_below_a_layer(text: str, below: str) -> None:
    assert SiteName.parse(text).below_layer == below
