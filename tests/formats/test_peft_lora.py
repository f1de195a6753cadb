"""Adapters for stock PEFT, loaded in a process that never imports apportion: the logits are the adapter's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import apportion
from apportion.errors import OutputWriteError
from apportion.formats.factors import read_adapter
from apportion.formats.peft_loaded import read_back
from apportion.formats.verify import check_written
from served import EXPERTS, FULL, Case, save_case

CASES = [
    Case("olmoe", options=FULL),
    Case("olmoe", options=EXPERTS),
    Case("olmoe", "marginal", {"budget": 3000}),
    Case("mixtral", "hellori", FULL),
    Case("qwen3_moe", options=FULL),
    Case("deepseek_v3", options={"hot": 3, "targets": "attention,router,experts,shared,dense"}),
    Case("gpt_oss", options=FULL | {"layers": "1"}),
    Case("olmoe", "melora", {"targets": "attention,router,experts"}),
    Case("llama", "lora"),
]

# What vLLM and SGLang load is loaded by PEFT too, where it knows the checkpoint's names.
PER_EXPERT = [Case("olmoe", options=FULL), Case("mixtral", "hellori", FULL), Case("qwen3_moe", options=EXPERTS)]


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Export every case, run them all in one process of stock PEFT; by case, our logits and PEFT's."""
    root = tmp_path_factory.mktemp("served")
    ours, pairs = {}, []
    for case in CASES:
        folder, ours[case.name] = save_case(case, root / case.family)
        out = apportion.export(folder, root / "exported" / case.name, format="peft")
        pairs.append(f"{root / case.family / 'base'}:{out}")
    script = Path(__file__).with_name("stock_peft.py")
    for case in PER_EXPERT:
        folder = root / case.family / case.name
        if not folder.exists():
            folder, ours[case.name] = save_case(case, root / case.family)
        out = apportion.export(folder, root / "per-expert" / case.name, format="vllm")
        pairs.append(f"{root / case.family / 'base'}:{out}")
    subprocess.run([sys.executable, "-W", "ignore", str(script), str(root / "logits"), *pairs], check=True)
    theirs = load_file(root / "logits")
    forms = [("exported", case.name) for case in CASES] + [("per-expert", case.name) for case in PER_EXPERT]
    return {
        f"{form}/{name}": (ours[name], {way: theirs[f"{root / form / name}:{way}"] for way in WAYS})
        for form, name in forms
    }


WAYS = ("attached", "loaded", "merged")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stock_peft_computes_the_same(case: Case, logits: dict[str, tuple[Tensor, dict[str, Tensor]]]) -> None:
    ours, theirs = logits[f"exported/{case.name}"]
    for way in WAYS:
        assert (ours - theirs[way]).abs().max() < 1e-4, way


@pytest.mark.parametrize("case", PER_EXPERT, ids=lambda case: case.name)
def test_stock_peft_computes_the_same_from_pairs_per_expert(
    case: Case, logits: dict[str, tuple[Tensor, dict[str, Tensor]]]
) -> None:
    ours, theirs = logits[f"per-expert/{case.name}"]
    for way in WAYS:
        assert (ours - theirs[way]).abs().max() < 1e-4, way


def _swap_experts(a: Tensor, b: Tensor) -> None:
    a.copy_(a.view(4, -1, a.shape[1]).roll(1, 0).reshape(a.shape))


def _join_halves(a: Tensor, b: Tensor) -> None:
    b.copy_(torch.cat([b[0::2], b[1::2]]))


def _leave_the_scale_out(a: Tensor, b: Tensor) -> None:
    b.div_(1.5)


@pytest.mark.parametrize("mutate", [_swap_experts, _join_halves, _leave_the_scale_out])
def test_a_wrong_layout_fails_the_check(mutate: Callable[[Tensor, Tensor], None], tmp_path: Path) -> None:
    folder, _ = save_case(Case("gpt_oss", options=FULL), tmp_path)
    out, adapter = apportion.export(folder, tmp_path / "out"), read_adapter(folder)
    check_written(adapter, read_back(adapter, out))
    tensors = load_file(out / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_{}.weight"
    mutate(tensors[key.format("A")], tensors[key.format("B")])
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OutputWriteError, match=r"experts\.\d\.gate_proj"):
        check_written(adapter, read_back(adapter, out))
