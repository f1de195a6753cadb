"""What engines apply is one table of data, and the documentation shows it."""

from __future__ import annotations

from pathlib import Path

from apportion.formats.support import LLAMA_CPP, SGLANG, VLLM, Engine

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def _row(engine: Engine) -> str:
    by_kinds: dict[str, list[str]] = {}
    for model_type, kinds in engine.applies.items():
        by_kinds.setdefault(", ".join(kinds), []).append(f"`{model_type}`")
    applied = "; ".join(f"{kinds}: {', '.join(types)}" for kinds, types in by_kinds.items())
    return f"| {engine.name} | {engine.version} | {engine.checked} | {applied} |"


def test_the_page_shows_the_table() -> None:
    for engine in (LLAMA_CPP, VLLM, SGLANG):
        assert _row(engine) in PAGE.read_text(), _row(engine)


def test_a_kind_is_applied_or_has_a_reason() -> None:
    for engine in (LLAMA_CPP, VLLM, SGLANG):
        for kind, reasons in engine.reasons.items():
            assert not any(kind in engine.applies.get(model_type, ()) for model_type in reasons)
    assert "plain layer" in VLLM.why_not("router", "qwen3_moe")
    assert "no adapters for routers" in SGLANG.why_not("router", "olmoe")
    assert VLLM.why_not("dense", "qwen3_moe") == "not checked with vLLM 0.32.0"
