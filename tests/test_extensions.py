"""What users add without touching the package: a planner and a format, each from measurement to merged model."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import apportion
from apportion.cli.main import app
from apportion.errors import ConfigurationError
from apportion.formats.export import FORMATS, Format
from apportion.formats.factors import SavedAdapter
from apportion.loading import load_model
from apportion.methods.base import AdapterSettings, Method
from apportion.methods.registry import METHODS
from apportion.methods.targets import targeted_sites
from apportion.records.options import MethodOptions
from apportion.records.placement import Placement
from apportion.records.profile import Profile


class EvenLayersOptions(MethodOptions):
    """Options of the planner below."""

    every: int = 2


def place_every(profile: Profile, options: EvenLayersOptions, settings: AdapterSettings) -> list[Placement]:
    """Adapt the targeted sites of every n-th layer."""
    sites = targeted_sites(options, profile.layout)
    return settings.at(site for site in sites if site.layer % options.every == 0 and site.kind == "attention")


def write_scales(adapter: SavedAdapter, folder: Path, dtype: torch.dtype | None) -> None:
    """Write every site's scale and the norm of its product."""
    norms = {
        site.name: [placement.scale, float((b_OR @ a_RI).norm())]
        for site, placement, a_RI, b_OR, _ in adapter.factors()
    }
    (folder / "norms.json").write_text(json.dumps(norms))


def refuse_experts(adapter: SavedAdapter) -> None:
    if any(placement.name.expert is not None for placement in adapter.placements):
        raise ConfigurationError("norms of experts are not written.")


@pytest.fixture
def extended() -> Iterator[None]:
    """Register both, and take them out again."""
    METHODS["every"] = Method("every", "every n-th layer", "here", EvenLayersOptions, place_every)
    FORMATS["norms"] = Format("nothing but this test", refuse_experts, write_scales)
    yield
    del METHODS["every"], FORMATS["norms"]


def _run(*words: object) -> None:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_a_planner_and_a_format_work_from_profile_to_export(
    extended: None, embedded_model: tuple[nn.Module, Any], tmp_path: Path
) -> None:
    model, tokenizer = embedded_model
    batch = tokenizer(["Calculate 5 - 3."], return_tensors="pt")
    profile = apportion.profile(model, [batch], provenance={"model": "embedded"})
    assert apportion.cost("embedded", "every", rank=2, every=4).sites_by_kind == {"attention": 4}
    plan = apportion.plan(profile, "every", rank=2, every=2)
    assert {placement.name.layer for placement in plan.placements} == {0, 2}
    plan.save(tmp_path / "plan.json")
    data = ("--data", "task:aiw", "--samples", 8, "--batch-size", 4, "--save-every", 2, "--steps", 4, "--lr", "1e-2")
    _run("train", tmp_path / "plan.json", *data, "-o", tmp_path / "whole")
    _run("train", tmp_path / "plan.json", *data, "-o", tmp_path / "adapter")
    for name in ("adapter_model.safetensors", "adapter_config.json", "training.json"):
        (tmp_path / "adapter" / name).unlink()
    for newer in (tmp_path / "adapter" / "checkpoints").glob("checkpoint-4"):
        newer.rename(tmp_path / "gone")
    _run("train", tmp_path / "plan.json", *data, "-o", tmp_path / "adapter", "--resume")
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "adapter"))
    assert first == second
    loaded = apportion.load(copy.deepcopy(model), tmp_path / "adapter").eval()
    expected = loaded(**batch).logits
    _run("merge", tmp_path / "adapter", "-o", tmp_path / "merged")
    assert torch.allclose(load_model(tmp_path / "merged")[0](**batch).logits, expected, atol=1e-5)
    assert not torch.allclose(model(**batch).logits, expected, atol=1e-3)
    apportion.export(tmp_path / "adapter", tmp_path / "norms", format="norms")
    written = json.loads((tmp_path / "norms" / "norms.json").read_text())
    assert written.keys() == {placement.site for placement in plan.placements}
    assert all(scale == 2 and norm > 0 for scale, norm in written.values())
    _run("export", tmp_path / "adapter", "--format", "norms", "-o", tmp_path / "again")


def test_a_format_refuses_before_it_writes(
    extended: None, embedded_model: tuple[nn.Module, Any], tmp_path: Path
) -> None:
    model, tokenizer = embedded_model
    profile = apportion.profile(model, [tokenizer(["a"], return_tensors="pt")], provenance={"model": "embedded"})
    adapted = apportion.apply(copy.deepcopy(model), apportion.plan(profile, "hellora", hot=1, rank=2))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match="norms of experts"):
        apportion.export(tmp_path / "adapter", tmp_path / "norms", format="norms")
    assert not (tmp_path / "norms").exists()
