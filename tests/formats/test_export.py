"""Adapters written for other software, from their folders: the numbers are those of the adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import apportion
from apportion.cli.main import app
from apportion.configurations import config_source
from apportion.errors import (
    AdapterError,
    ApportionError,
    ConfigurationError,
    ModelLoadError,
    OutputExistsError,
    OutputWriteError,
    PlanMismatchError,
)
from apportion.formats import peft_lora
from apportion.formats.factors import read_adapter
from apportion.peft.attach import PhaseOptions
from apportion.peft.site_factors import site_factors
from apportion.records.profile import Profile
from tiny_models import build_dense, build_tiny

ProfileOf = Callable[[nn.Module], Profile]


@pytest.fixture
def saved(profile_of: ProfileOf, tmp_path: Path) -> Callable[..., tuple[nn.Module, nn.Module, Path]]:
    """Plan, attach, shake and save an adapter; returns the base, the model with the adapter, and the folder."""

    def make(name: str, method: str, store_a: bool = False, **options: Any) -> tuple[nn.Module, nn.Module, Path]:
        model = build_dense() if name == "dense" else build_tiny(name)
        base = copy.deepcopy(model)
        model.config.save_pretrained(tmp_path / "base")
        plan = apportion.plan(profile_of(model), method, rank=4, **options)
        adapted = apportion.apply(model, plan, phase=PhaseOptions(store_a=store_a))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / "adapter")
        return base, adapted.eval(), tmp_path / "adapter"

    return make


LINEAR = [
    ("dense", "lori", {}),
    ("dense", "lora", {"ranks": {"dense": 6}}),
    ("olmoe", "lori", {"targets": "attention"}),
    ("olmoe", "lori", {"targets": "attention", "store_a": True}),
]


@pytest.mark.parametrize(("name", "method", "options"), LINEAR)
def test_plain_lora_loads_in_stock_peft(
    name: str, method: str, options: dict[str, Any], saved: Any, tokens: Tensor, tmp_path: Path
) -> None:
    base, adapted, folder = saved(name, method, **options)
    apportion.export(folder, tmp_path / "plain", format="peft", model=tmp_path / "base")
    stock = peft.PeftModel.from_pretrained(base, str(tmp_path / "plain"))
    assert type(stock.peft_config["default"]) is peft.LoraConfig
    assert torch.allclose(stock(input_ids=tokens).logits, adapted(input_ids=tokens).logits, atol=1e-6)
    with pytest.raises(OutputExistsError):
        apportion.export(folder, tmp_path / "plain", model=tmp_path / "base")


@pytest.mark.parametrize(("method", "options"), [("hellora", {"hot": 2}), ("hellori", {"hot": 2}), ("lora_smoe", None)])
def test_factors_from_the_folder_are_those_of_the_model(
    method: str, options: dict[str, Any] | None, saved: Any, tmp_path: Path, tokens: Tensor
) -> None:
    _, adapted, folder = saved("olmoe", "uniform" if options is None else method, **(options or {"experts": 2}))
    read = {site.name: (a, b) for site, _, a, b, _ in read_adapter(folder, tmp_path / "base").factors()}
    held = {site: (a, b) for site, a, b in site_factors(adapted, "default")}
    assert read.keys() == held.keys()
    for site, (a, b) in held.items():
        assert torch.equal(read[site][0], a)
        assert torch.equal(read[site][1], b)


def test_factors_are_written_in_the_type_asked_for(saved: Any, tmp_path: Path) -> None:
    _, _, folder = saved("dense", "lora")
    apportion.export(folder, tmp_path / "plain", model=tmp_path / "base", dtype="bfloat16")
    written = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_routed_experts_are_refused(saved: Any, tmp_path: Path) -> None:
    _, _, folder = saved("olmoe", "uniform", experts=2)
    with pytest.raises(ConfigurationError, match="several LoRA experts"):
        apportion.export(folder, tmp_path / "plain", model=tmp_path / "base")
    assert not (tmp_path / "plain").exists()


def test_nothing_is_left_of_what_differs_from_the_adapter(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, folder = saved("dense", "lora")
    scaled = peft_lora.folded
    monkeypatch.setattr(
        peft_lora, "folded", lambda *args: (pair._replace(b_OR=pair.b_OR / 2) for pair in scaled(*args))
    )
    with pytest.raises(OutputWriteError, match="does not say what the adapter says"):
        apportion.export(folder, tmp_path / "plain", model=tmp_path / "base")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_the_readme_tells_what_was_written(saved: Any, tmp_path: Path) -> None:
    _, _, folder = saved("olmoe", "hellori", hot=2)
    text = (apportion.export(folder, tmp_path / "out", model=tmp_path / "base") / "README.md").read_text()
    for fact in ("`hellori`", "12 experts", "The frozen A is written out", "times the adapter", "PeftModel.from_"):
        assert fact in text, text


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_routers_are_merged_into_a_copy_of_the_base(saved: Any, tmp_path: Path, tokens: Tensor) -> None:
    base, adapted, folder = saved("olmoe", "hellora", hot=2)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(config_source("embedded")).save_pretrained(tmp_path / "base")
    out = apportion.export(folder, tmp_path / "out", router="merge", model=tmp_path / "base")
    assert not any("gate.lora" in name for name in load_file(out / "adapter_model.safetensors"))
    merged = AutoModelForCausalLM.from_pretrained(out / "base").eval()
    assert not torch.allclose(merged(input_ids=tokens).logits, adapted(input_ids=tokens).logits, atol=1e-3)
    stock = peft.PeftModel.from_pretrained(merged, str(out))
    assert torch.allclose(stock(input_ids=tokens).logits, adapted(input_ids=tokens).logits, atol=1e-5)
    assert f"LoRA adapter for {out / 'base'}" in (out / "README.md").read_text()


def test_merging_routers_needs_routers_and_weights(saved: Any, tmp_path: Path) -> None:
    _, _, folder = saved("olmoe", "hellora", hot=2)
    with pytest.raises(ModelLoadError, match="needs its weights"):
        apportion.export(folder, tmp_path / "out", router="merge", model=tmp_path / "base")
    with pytest.raises(ConfigurationError, match="neither refuse nor merge"):
        apportion.export(folder, tmp_path / "out", router="drop", model=tmp_path / "base")  # type: ignore[arg-type]
    _, _, folder = saved("olmoe", "hellora", hot=2, targets="experts")
    with pytest.raises(ConfigurationError, match="no routers to merge"):
        apportion.export(folder, tmp_path / "out", router="merge", model=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_what_is_given_wrongly_is_refused(saved: Any, tmp_path: Path) -> None:
    _, _, folder = saved("dense", "lora")
    wrong: list[tuple[dict[str, Any], type[ApportionError], str]] = [
        ({"format": "pfet"}, ConfigurationError, "did you mean peft"),
        ({"dtype": "int4"}, ConfigurationError, "choose among float32"),
        ({"model": None}, ConfigurationError, "give --model"),
        ({"model": "no/such-model"}, ConfigurationError, "configuration with --model"),
        ({"model": "olmoe-1b-7b"}, PlanMismatchError, "no place for"),
    ]
    for options, error, message in wrong:
        with pytest.raises(error, match=message):
            apportion.export(folder, tmp_path / "plain", **({"model": tmp_path / "base"} | options))
        assert not (tmp_path / "plain").exists()


def test_changed_tensors_are_refused(saved: Any, tmp_path: Path) -> None:
    _, _, folder = saved("dense", "lora")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    with pytest.raises(AdapterError, match="not those that were saved"):
        apportion.export(folder, tmp_path / "plain", model=tmp_path / "base")


def test_an_adapter_on_top_of_another_is_refused(saved: Any, tmp_path: Path) -> None:
    _, _, folder = saved("dense", "lora")
    file = folder / "adapter_config.json"
    below = '"on_top_of": {"path": "below", "sha256": "0"}'
    file.write_text(file.read_text().replace('"on_top_of": null', below))
    with pytest.raises(ConfigurationError, match="on top of another one"):
        apportion.export(folder, tmp_path / "plain", model=tmp_path / "base")


def test_the_command_writes_plain_lora(saved: Any, tmp_path: Path) -> None:
    _, _, folder = saved("dense", "lora")
    words = ["export", str(folder), "--model", str(tmp_path / "base"), "-o", str(tmp_path / "plain")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    assert "PeftModel.from_pretrained" in done.output
