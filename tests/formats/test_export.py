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
from typer.testing import CliRunner

import apportion
from apportion.cli.main import app
from apportion.errors import AdapterError, ApportionError, ConfigurationError, OutputExistsError, PlanMismatchError
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


@pytest.mark.parametrize(("method", "reason"), [("hellori", "no linear layer"), ("uniform", "several LoRA experts")])
def test_what_plain_lora_cannot_express_is_refused(method: str, reason: str, saved: Any, tmp_path: Path) -> None:
    _, _, folder = saved("olmoe", method, **({"hot": 2} if method == "hellori" else {"experts": 2}))
    with pytest.raises(ConfigurationError, match=reason):
        apportion.export(folder, tmp_path / "plain", model=tmp_path / "base")
    assert not (tmp_path / "plain").exists()


def test_what_is_given_wrongly_is_refused(saved: Any, tmp_path: Path) -> None:
    _, _, folder = saved("dense", "lora")
    wrong: list[tuple[dict[str, Any], type[ApportionError], str]] = [
        ({"format": "pfet"}, ConfigurationError, "did you mean peft"),
        ({"dtype": "int4"}, ConfigurationError, "choose among float32"),
        ({"model": None}, ConfigurationError, "give --model"),
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
    }
