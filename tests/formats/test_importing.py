"""Adapters of stock PEFT become ours: nothing is lost on the way in, or there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import apportion
from apportion.cli.main import app
from apportion.errors import AdapterError, ConfigurationError, OutputExistsError
from apportion.formats.factors import read_adapter
from apportion.formats.pairs import folded
from served import EXPERTS, FULL, TOKENS, Case, build_served, save_case

ROUND_TRIPS = [
    (Case("olmoe", options=FULL), "peft"),
    (Case("olmoe", "marginal", {"budget": 3000}), "vllm"),
    (Case("mixtral", "hellori", FULL), "vllm"),
    (Case("qwen3_moe", options=EXPERTS), "sglang"),
    (Case("gpt_oss", options=FULL), "vllm"),
    (Case("deepseek_v3", options={"hot": 3, "targets": "attention,router,experts,shared,dense"}), "peft"),
    (Case("llama", "lora"), "peft"),
]


@pytest.mark.parametrize(("case", "form"), ROUND_TRIPS, ids=[f"{case.name}-{form}" for case, form in ROUND_TRIPS])
def test_there_and_back_is_exact(case: Case, form: str, tmp_path: Path) -> None:
    folder, logits = save_case(case, tmp_path)
    out = apportion.export(folder, tmp_path / "out", format=form)
    back = apportion.import_adapter(out, tmp_path / "back", model=tmp_path / "base")
    ours = {pair.site.name: pair for pair in folded(read_adapter(folder))}
    imported = read_adapter(back)
    assert {placement.site for placement in imported.placements} <= ours.keys()
    for site, a_RI, b_OR in folded(imported):
        kept = ours[site.name].b_OR.ne(0).any(0)  # a rank of a sparse B may have no entry left
        assert torch.equal(a_RI, ours[site.name].a_RI[kept])
        assert torch.equal(b_OR, ours[site.name].b_OR[:, kept])
    again = apportion.export(back, tmp_path / "again", format=form)
    assert load_file(out / "adapter_model.safetensors").keys() == load_file(again / "adapter_model.safetensors").keys()
    loaded = apportion.load(build_served(case.family), back).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=TOKENS).logits, logits, atol=1e-5)


def _trained_by_peft(tmp_path: Path, **options: Any) -> tuple[Path, torch.Tensor]:
    model = build_served("olmoe")
    model.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=7, **options))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "stock")
    with torch.no_grad():
        return tmp_path / "stock", model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"target_modules": ["o_proj"], "target_parameters": ["mlp.gate.weight"], "use_rslora": True},
    ],
)
def test_what_stock_peft_trained_computes_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    stock, logits = _trained_by_peft(tmp_path, **options)
    ours = apportion.import_adapter(stock, tmp_path / "ours")
    loaded = apportion.load(build_served("olmoe"), ours).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=TOKENS).logits, logits, atol=1e-5)
    merged = loaded.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=TOKENS).logits, logits, atol=1e-5)


def test_what_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    stock, _ = _trained_by_peft(tmp_path, target_modules=["q_proj"])
    config = json.loads((stock / "adapter_config.json").read_text())
    tensors = load_file(stock / "adapter_model.safetensors")
    wrong: list[tuple[dict[str, Any], dict[str, torch.Tensor], type[Exception], str]] = [
        ({"use_dora": True}, tensors, ConfigurationError, "not plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, tensors, ConfigurationError, "not plain LoRA"),
        ({"peft_type": "IA3"}, tensors, ConfigurationError, "not one of stock LoRA"),
        ({"base_model_name_or_path": None}, tensors, ConfigurationError, "give --model"),
        ({"target_modules": ["k_proj"]}, tensors, ConfigurationError, "does not load this adapter whole"),
        ({}, {k: v * 0 for k, v in tensors.items()}, ConfigurationError, "changes nothing"),
        ({}, {k: v / 0 for k, v in tensors.items()}, AdapterError, "not finite"),
    ]
    for changes, others, error, message in wrong:
        (stock / "adapter_config.json").write_text(json.dumps(config | changes))
        save_file(others, stock / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(error, match=message):
            apportion.import_adapter(stock, tmp_path / "ours")
    (stock / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="cannot be read"):
        apportion.import_adapter(stock, tmp_path / "ours")
    with pytest.raises(OutputExistsError):
        apportion.import_adapter(stock, tmp_path / "base")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "stock"}


def test_the_command_imports(tmp_path: Path) -> None:
    stock, _ = _trained_by_peft(tmp_path, target_modules=["q_proj"])
    done = CliRunner().invoke(app, ["import", str(stock), "-o", str(tmp_path / "ours")])
    assert done.exit_code == 0, done.output
    assert "2 attention" in done.output
