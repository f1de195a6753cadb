"""What holds for every architecture whose experts transformers marks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import apportion
from apportion.discovery import find_sites
from architectures import NOT_SUPPORTED, PAGE, SUPPORTED, UNMARKED, build, marked, page


def test_every_marked_architecture_is_listed() -> None:
    assert not SUPPORTED.keys() & NOT_SUPPORTED.keys()
    assert marked() >= SUPPORTED.keys() | NOT_SUPPORTED.keys()
    if f"transformers {transformers.__version__} " in PAGE.read_text():  # later versions may have more
        assert marked() == SUPPORTED.keys() | NOT_SUPPORTED.keys()
        assert PAGE.read_text() == page(), "run: python tests/architectures.py"


@pytest.fixture(autouse=True)
def _one_thread(_seeded: None) -> None:
    """Tiny products gain nothing from threads, which wait for each other where the machine has other work."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", sorted(SUPPORTED | UNMARKED))
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the architectures' own making
def test_architecture(name: str, tokens: Tensor, tmp_path: Path) -> None:
    tokens = tokens[:4, :12].contiguous()
    model = build(name)
    layout = find_sites(model)
    assert layout.is_moe
    profile = apportion.profile(model, [{"input_ids": tokens}])
    assert profile.counts["default"].sum(1).tolist() == [tokens.numel() * block.top_k for block in layout.blocks]

    base = copy.deepcopy(model)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        adapted = apportion.apply(model, apportion.plan(profile, "hellora", hot=2, rank=4))
        assert torch.allclose(adapted(input_ids=tokens).logits, before, atol=1e-5, rtol=0)

    start = {key: parameter.detach().clone() for key, parameter in adapted.named_parameters()}
    trainable = {key for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    adapted.train()
    for _ in range(3):
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        assert {key for key, parameter in adapted.named_parameters() if parameter.grad is not None} == trainable
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    moved = {key for key, parameter in adapted.named_parameters() if not torch.equal(parameter, start[key])}
    assert moved == trainable

    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits
        adapted.save_pretrained(tmp_path)
        loaded = apportion.load(base, tmp_path).eval()
        assert torch.allclose(loaded(input_ids=tokens).logits, expected, atol=1e-6, rtol=0)
        merged = adapted.merge_and_unload()
        assert torch.allclose(merged(input_ids=tokens).logits, expected, atol=1e-5, rtol=0)
