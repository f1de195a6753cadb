"""Loading models that are more than causal language models."""

from __future__ import annotations

from pathlib import Path

import torch

from apportion.loading import load_model
from architectures import build


def test_the_model_without_its_head_is_found(tmp_path: Path, embedded_model: tuple[object, object]) -> None:
    model = build("llama4")
    model.save_pretrained(tmp_path)
    embedded_model[1].save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path)
    assert loaded.base_model is loaded.model
    loaded.save_pretrained(tmp_path / "again")
    embedded_model[1].save_pretrained(tmp_path / "again")
    again, _ = load_model(tmp_path / "again")
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), model.parameters(), strict=True))


def test_a_vision_language_model_is_loaded_whole(tmp_path: Path, embedded_model: tuple[object, object]) -> None:
    model = build("qwen3_vl_moe")
    model.save_pretrained(tmp_path)
    embedded_model[1].save_pretrained(tmp_path)
    loaded, tokenizer = load_model(tmp_path)
    assert type(loaded) is type(model)
    assert tokenizer.padding_side == "left"
    ids = torch.arange(3, 9)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
