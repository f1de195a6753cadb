"""On every architecture with experts, PEFT's own loader reads an export whole, or the export is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import apportion
from apportion.discovery import find_sites
from apportion.errors import ConfigurationError
from apportion.profiling.run import profile
from architectures import SUPPORTED, UNMARKED, build
from served import TOKENS

LOSES_A_PART = ("deepseek_ocr2", "laguna", "mistral_large4", "unlimited_ocr")
HAS_NO_FORM = ("dbrx", "nemotron_h")
NO_LANGUAGE_MODEL = ("openai_privacy_filter",)


@pytest.mark.parametrize("name", sorted((SUPPORTED | UNMARKED).keys() - set(NO_LANGUAGE_MODEL)))
def test_an_export_is_loaded_whole_or_refused(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.config.save_pretrained(tmp_path / "base")
    kinds = ",".join(sorted({site.kind for site in find_sites(model).sites()}))
    measured = profile(model, [{"input_ids": TOKENS}])
    adapted = apportion.apply(model, apportion.plan(measured, "hellora", hot=2, rank=2, targets=kinds))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    if name in LOSES_A_PART + HAS_NO_FORM:
        reason = "no form for adapters" if name == "dbrx" else "does not load this adapter whole"
        with pytest.raises(ConfigurationError, match=reason):
            apportion.export(tmp_path / "adapter", tmp_path / "out", model=tmp_path / "base")
        assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    else:
        apportion.export(tmp_path / "adapter", tmp_path / "out", model=tmp_path / "base")


def test_the_page_counts_them() -> None:
    refused = (*LOSES_A_PART, *HAS_NO_FORM, *NO_LANGUAGE_MODEL)
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    assert f"On {len(SUPPORTED | UNMARKED) - len(refused)} of the" in page
    assert all(f"`{name}`" in page for name in LOSES_A_PART + HAS_NO_FORM)
