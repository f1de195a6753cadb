"""Loading models that are more than causal language models."""

from __future__ import annotations

from pathlib import Path

import torch

from apportion.loading import load_model
from architectures import build


def test_a_vision_language_model_is_loaded_whole(tmp_path: Path, embedded_model: tuple[object, object]) -> None:
    model = build("qwen3_vl_moe")
    model.save_pretrained(tmp_path)
    embedded_model[1].save_pretrained(tmp_path)
    loaded, tokenizer = load_model(tmp_path)
    assert type(loaded) is type(model)
    assert tokenizer.padding_side == "left"
    ids = torch.arange(3, 9)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
