"""Adapters for vLLM and SGLang, against the rules of their loaders; the engines themselves are not run here."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import apportion
from apportion.errors import ConfigurationError, OutputPathError, OutputWriteError
from apportion.formats import per_expert, vllm
from apportion.formats.checkpoint_names import checkpoint_name
from apportion.formats.factors import SavedAdapter, read_adapter
from apportion.formats.pairs import folded
from apportion.formats.support import SGLANG, VLLM
from apportion.formats.verify import check_written
from served import EXPERTS, FULL, Case, save_case

PREFIX = "base_model.model."
ROUTED = re.compile(r"\.experts\.(\d+)\.")


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def _export(case: Case, form: str, tmp_path: Path) -> tuple[SavedAdapter, Path]:
    folder, _ = save_case(case, tmp_path)
    return read_adapter(folder), apportion.export(folder, tmp_path / form, format=form)


@pytest.mark.parametrize("family", sorted(VLLM.applies.keys() | SGLANG.applies.keys()))
def test_the_table_has_the_names_of_saved_checkpoints(family: str, tmp_path: Path) -> None:
    folder, _ = save_case(Case(family, "lora"), tmp_path)
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as opened:
        stored = {name.removesuffix(".weight") for name in opened.keys()}  # noqa: SIM118
    for site in read_adapter(folder).layout.sites():
        name = checkpoint_name(site.name, family)
        if family != "gpt_oss" or site.expert is None:  # its checkpoints have the experts stacked
            assert name in stored, name


# Rules of vLLM's loader: names decide; all experts and projections of a layer; one rank, from the list; no patterns.
VLLM_CASES = [
    Case("olmoe", options=FULL),
    Case("olmoe", "marginal", {"budget": 3000}),
    Case("olmoe", "melora", {"targets": "attention,router,experts"}),
    Case("mixtral", "hellori", FULL | {"layers": "1"}),
    Case("qwen3_moe", options=EXPERTS),
]


@pytest.mark.parametrize("case", VLLM_CASES, ids=lambda case: case.name)
def test_vllm_loads_what_is_written(case: Case, tmp_path: Path) -> None:
    adapter, out = _export(case, "vllm", tmp_path)
    tensors, config = _read(out)
    assert config["lora_alpha"] == config["r"]
    assert not any(config[name] for name in ("rank_pattern", "alpha_pattern", "use_rslora"))
    modules = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors}
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as opened:
        assert modules <= {name.removesuffix(".weight") for name in opened.keys()}  # noqa: SIM118
    experts = [name for name in modules if ROUTED.search(name)]
    block = adapter.layout.blocks[0]
    layers = {name.partition(".experts.")[0] for name in experts}
    assert len(experts) == len(layers) * block.num_experts * 3
    assert {tensors[f"{PREFIX}{name}.lora_A.weight"].shape[0] for name in modules} == {config["r"]}
    expected = {checkpoint_name(pair.site.name, case.family): pair.b_OR @ pair.a_RI for pair in folded(adapter)}
    for name in modules:
        product = tensors[f"{PREFIX}{name}.lora_B.weight"] @ tensors[f"{PREFIX}{name}.lora_A.weight"]
        assert torch.allclose(product, expected.get(name, torch.zeros_like(product)), atol=1e-5), name


def test_vllm_reads_experts_of_gpt_oss_fused(tmp_path: Path) -> None:
    _, out = _export(Case("gpt_oss", options=FULL, only="down_proj|router"), "vllm", tmp_path)
    tensors, config = _read(out)
    assert {key.split(".experts.")[1] for key in tensors if ".experts." in key} == {
        f"{nested}lora_{part}.weight" for nested in ("", "base_layer.") for part in "AB"
    }
    assert config["lora_alpha"] == config["r"] == 4
    assert not config["rank_pattern"]
    gate_up = tensors[f"{PREFIX}model.layers.0.mlp.experts.base_layer.lora_A.weight"]
    assert gate_up.shape == (4 * 4, 32)
    assert not gate_up.any()


# Rules of SGLang's loader (srt/lora/lora.py, utils.py): target modules by the names below; q needs v; w1, w2 and w3 are
# renamed; each tensor must contain a normalised target; one rank; alpha / r is the scale.
SGLANG_TARGETS = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj", "o_proj": "o_proj", "down_proj": "down_proj",
}  # fmt: skip
SGLANG_CASES = [
    Case("olmoe", options=EXPERTS),
    Case("mixtral", options=EXPERTS, only="q_proj|down_proj"),
    Case("qwen3_moe", "marginal", {"budget": 3000, "targets": "attention,experts"}),
    Case("deepseek_v3", options={"hot": 3, "targets": "experts,dense"}),
]


@pytest.mark.parametrize("case", SGLANG_CASES, ids=lambda case: case.name)
def test_sglang_loads_what_is_written(case: Case, tmp_path: Path) -> None:
    _, out = _export(case, "sglang", tmp_path)
    tensors, config = _read(out)
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] == config["r"]
    normalised = {SGLANG_TARGETS[name] for name in config["target_modules"]}  # type: ignore[attr-defined]
    for old, new in ((".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj.")):
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert SGLANG_TARGETS[name.split(".")[-3]] in normalised, name
        assert tensor.shape[0 if "lora_A" in name else 1] == config["r"], name
        if ".q_proj." in name:
            assert name.replace(".q_proj.", ".v_proj.") in tensors


REFUSED = [
    (Case("qwen3_moe", options=FULL), "vllm", "never calls the one with the adapter"),
    (Case("olmoe", options=FULL), "sglang", "no adapters for routers"),
    (Case("deepseek_v3", options=EXPERTS), "sglang", "not checked with SGLang"),
    (Case("deepseek_v3", options=EXPERTS), "vllm", "adapters of deepseek_v3 are not written for vLLM"),
    (Case("gpt_oss", options=EXPERTS), "sglang", "adapters of gpt_oss are not written for SGLang"),
    (Case("olmoe", "uniform", {"experts": 2}), "vllm", "several LoRA experts"),
]


@pytest.mark.parametrize(("case", "form", "reason"), REFUSED, ids=[f"{case.name}-{form}" for case, form, _ in REFUSED])
def test_what_a_server_would_leave_out_is_refused(case: Case, form: str, reason: str, tmp_path: Path) -> None:
    folder, _ = save_case(case, tmp_path)
    with pytest.raises(ConfigurationError, match=reason) as caught:
        apportion.export(folder, tmp_path / "out", format=form)
    assert ("--router merge" in str(caught.value)) == (".gate" in str(caught.value))
    assert not (tmp_path / "out").exists()


def test_ranks_that_vllm_has_no_room_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = save_case(Case("olmoe", options=FULL), tmp_path)
    monkeypatch.setattr(vllm, "_RANKS", (1, 2))
    with pytest.raises(ConfigurationError, match="vLLM takes ranks up to 2"):
        apportion.export(folder, tmp_path / "out", format="vllm")


def test_the_commands_have_room_for_the_rank(tmp_path: Path) -> None:
    _, out = _export(Case("gpt_oss", options=EXPERTS), "vllm", tmp_path)
    text = (out / "README.md").read_text()
    assert f"vllm serve {tmp_path / 'base'} --enable-lora --max-lora-rank 8 --lora-modules vllm={out}" in text
    _, out = _export(Case("olmoe", options=EXPERTS), "sglang", tmp_path / "other")
    assert f"--enable-lora --lora-paths sglang={out}" in (out / "README.md").read_text()


def test_the_readme_says_what_padding_costs(tmp_path: Path) -> None:
    """6.6 times for OLMoE with 8 of 64 experts: here 2 of 8 experts, and layers of which nothing is adapted."""
    adapter, out = _export(Case("olmoe", options={"hot": 2, "targets": "experts"}), "vllm", tmp_path)
    own = sum(pair.a_RI.numel() + pair.b_OR.numel() for pair in folded(adapter)) * 4
    written = sum(tensor.numel() for tensor in _read(out)[0].values()) * 4
    assert written == 4 * own
    assert f"({own:,} bytes in this type)" in (out / "README.md").read_text()


def test_names_of_folders_are_quoted_or_refused(tmp_path: Path) -> None:
    folder, _ = save_case(Case("olmoe", options=EXPERTS), tmp_path)
    spaced = apportion.export(folder, tmp_path / "a b", format="vllm")
    assert f"--lora-modules 'a b={spaced}'" in (spaced / "README.md").read_text()
    for name in (b"/\xff", b"/a\nb"):
        with pytest.raises(OutputPathError, match="characters that"):
            apportion.export(folder, os.fsdecode(os.fsencode(tmp_path) + name), format="peft")


@pytest.mark.parametrize("mutation", ["module names", "an expert missing", "experts swapped", "no scale"])
def test_wrong_folders_fail_the_check(mutation: str, tmp_path: Path) -> None:
    adapter, out = _export(Case("mixtral", options=EXPERTS), "vllm", tmp_path)
    tensors, _ = _read(out)
    first, second = (f"{PREFIX}model.layers.0.block_sparse_moe.experts.{n}.w1.lora_B.weight" for n in range(2))
    if mutation == "module names":
        tensors = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in tensors.items()}
    elif mutation == "an expert missing":
        tensors = {name: tensor for name, tensor in tensors.items() if ".experts.0.w2." not in name}
    elif mutation == "experts swapped":
        tensors[first], tensors[second] = tensors[second], tensors[first]
    else:
        tensors = {name: tensor / 1.5 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, out / "adapter_model.safetensors")
    with pytest.raises((ConfigurationError, OutputWriteError)):
        check_written(adapter, per_expert.read_back(adapter, out))
