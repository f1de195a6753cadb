"""LoRA as GGUF, run by llama.cpp itself: its log-probabilities are those of the model with the adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor, nn

import apportion
from apportion.errors import ConfigurationError, MissingDependencyError, OutputWriteError
from apportion.formats import gguf_lora
from apportion.formats.factors import read_adapter
from apportion.formats.support import LLAMA_CPP
from apportion.formats.verify import check_written
from gguf_base import write_base, write_embedded
from llama_cpp_engine import log_probs, serve
from served import EXPERTS, FULL, TOKENS, Case, build_served, save_case

CASES = [
    Case("olmoe", options=FULL),
    Case("olmoe", "marginal", {"budget": 3000}),
    Case("olmoe", "melora", {"targets": "attention,router,experts"}),
    Case("mixtral", "hellori", FULL),
    Case("mixtral", options=EXPERTS),
    Case("qwen3_moe", options=FULL),
    Case("deepseek_v3", options={"hot": 3, "targets": "router,experts,shared,dense"}),
    Case("gpt_oss", options=FULL | {"layers": "1"}),
    Case("deepseek_v2", options={"hot": 3, "targets": "router,experts,shared,dense"}),
    *(Case(family, "lora") for family in ("llama", "mistral", "qwen2", "qwen3")),
]


def _exported(case: Case, tmp_path: Path) -> tuple[Path, Path, Tensor]:
    """Save and export a case; return the base's and the adapter's file, and the log-probabilities expected."""
    folder, logits = save_case(case, tmp_path)
    out = apportion.export(folder, tmp_path / "out", format="gguf")
    base = write_base(build_served(case.family), tmp_path / "base.gguf")
    return base, out / "adapter.gguf", logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_llama_cpp_computes_the_same(case: Case, tmp_path: Path) -> None:
    base, adapter, expected = _exported(case, tmp_path)
    plain = log_probs(serve(base), TOKENS, 64)
    assert (plain - expected).abs().max() > 0.5
    assert (log_probs(serve(base, [adapter]), TOKENS, 64) - expected).abs().max() < 1e-4
    num_experts = {each.name: each.shape[-1] for each in gguf.GGUFReader(base).tensors if "_exps" in each.name}
    for tensor in gguf.GGUFReader(adapter).tensors:  # with fewer, llama.cpp reads past the end
        name = tensor.name.rpartition(".lora_")[0]
        assert name not in num_experts or tensor.shape[-1] == num_experts[name]


def test_every_architecture_in_the_table_is_run() -> None:
    assert {case.family for case in CASES} == set(LLAMA_CPP.applies) == set(gguf_lora.ARCHITECTURES)


def test_two_adapters_are_served_at_once(tmp_path: Path) -> None:
    cases = [Case("olmoe", options=EXPERTS), Case("olmoe", options=FULL)]
    saved = [save_case(case, tmp_path, seed) for seed, case in enumerate(cases)]
    files = [
        apportion.export(path, tmp_path / f"out{number}", format="gguf") / "adapter.gguf"
        for number, (path, _) in enumerate(saved)
    ]
    server = serve(write_base(build_served("olmoe"), tmp_path / "base.gguf"), files)
    for number, (_, logits) in enumerate(saved):
        chosen = [{"id": other, "scale": float(other == number)} for other in range(2)]
        found = log_probs(server, TOKENS, 64, lora=chosen)
        assert (found - logits[0, -1].log_softmax(-1)).abs().max() < 1e-4


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.2), ("float16", 0.02)])
def test_half_types_are_close(dtype: str, bound: float, tmp_path: Path) -> None:
    folder, logits = save_case(Case("olmoe", options=FULL), tmp_path)
    out = apportion.export(folder, tmp_path / "out", format="gguf", dtype=dtype)
    written = {each.tensor_type.name for each in gguf.GGUFReader(out / "adapter.gguf").tensors}
    assert written == {dtype.upper().replace("FLOAT", "F")}
    base = write_base(build_served("olmoe"), tmp_path / "base.gguf")
    found = log_probs(serve(base, [out / "adapter.gguf"]), TOKENS, 64)
    assert (found - logits[0, -1].log_softmax(-1)).abs().max() < bound


def _no_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_lora._Names, "permuted", lambda self, site, b_OR, back=False: b_OR)


def _no_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    folded = gguf_lora.folded
    monkeypatch.setattr(gguf_lora, "folded", lambda *args: (p._replace(b_OR=p.b_OR / 1.5) for p in folded(*args)))


def _swapped_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = gguf_lora._stacked

    def swapped(*args: Any) -> tuple[Tensor, Tensor]:
        a, b = stacked(*args)
        return (a.roll(1, 0) if a.ndim == 3 else a), b

    monkeypatch.setattr(gguf_lora, "_stacked", swapped)


@pytest.mark.parametrize("mutate", [_no_permutation, _no_scale, _swapped_experts])
def test_wrong_files_fail_the_checks(
    mutate: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, logits = save_case(Case("mixtral", options=EXPERTS), tmp_path)
    adapter, expected = read_adapter(folder), logits[0, -1].log_softmax(-1)
    base = write_base(build_served("mixtral"), tmp_path / "base.gguf")
    with monkeypatch.context() as patched:
        mutate(patched)
        (tmp_path / "wrong").mkdir()
        gguf_lora.write(adapter, tmp_path / "wrong", None)
    with pytest.raises(OutputWriteError, match="does not say what the adapter says"):
        check_written(adapter, gguf_lora.read_back(adapter, tmp_path / "wrong"))
    found = log_probs(serve(base, [tmp_path / "wrong" / "adapter.gguf"]), TOKENS, 64)
    assert (found - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("deepseek_v3", options={"hot": 3, "targets": "attention,experts"}), "without looking for an adapter"),
        (Case("olmoe", "uniform", {"experts": 2}), "several LoRA experts"),
    ],
)
def test_what_llama_cpp_would_leave_out_is_refused(case: Case, reason: str, tmp_path: Path) -> None:
    folder, _ = save_case(case, tmp_path)
    with pytest.raises(ConfigurationError, match=reason):
        apportion.export(folder, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = save_case(Case("llama", "lora"), tmp_path)
    monkeypatch.setattr(gguf_lora, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"apportion\[gguf\]"):
        apportion.export(folder, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_the_embedded_model_answers_the_same_text(embedded_model: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, tokenizer = copy.deepcopy(embedded_model[0]), embedded_model[1]
    base = write_embedded(model, tokenizer, tmp_path / "base.gguf")
    batch = tokenizer(["Calculate 5 - 3."], return_tensors="pt")
    measured = apportion.profile(model, [batch], provenance={"model": "embedded"})
    adapted = apportion.apply(model, apportion.plan(measured, "hellora", hot=4, rank=4))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    out = apportion.export(tmp_path / "adapter", tmp_path / "out", format="gguf")
    with torch.no_grad():
        answer = adapted.eval().generate(**batch, max_new_tokens=12, do_sample=False, pad_token_id=1)
    expected = tokenizer.decode(answer[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    request = {"prompt": "Calculate 5 - 3.", "n_predict": 12, "temperature": 0}
    found = serve(base, [out / "adapter.gguf"]).handle_completions(request)["choices"][0]["text"]
    assert found == expected
    assert serve(base).handle_completions(request)["choices"][0]["text"] != expected
