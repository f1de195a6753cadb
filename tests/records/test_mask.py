"""Masks: what no training keeps is refused, though it is hashed right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from apportion.errors import PlanError
from apportion.records import mask as masks
from apportion.records.mask import Mask, load_mask
from apportion.records.tensors import arrays_of

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A mask of two sites."""
    kept = {"a": torch.tensor([0, 3, 7], dtype=torch.int32), "b": torch.tensor([5], dtype=torch.int32)}
    Mask(kept, {"a": (4, 2), "b": (3, 2)}, provenance={"made": "by hand"}).save(tmp_path / "mask.safetensors")
    return tmp_path / "mask.safetensors"


def rewrite(path: Path, change: Change) -> None:
    """Change a mask, and hash it again."""
    with safe_open(path, "pt") as opened:
        header = json.loads(opened.metadata()["apportion_mask"])
        kept = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    header.pop("digest")
    change(header, kept)
    header["digest"] = masks._digest(header, arrays_of(kept))
    save_file(kept, path, {"apportion_mask": json.dumps(header)})


def _positions(*numbers: int, dtype: torch.dtype = torch.int32) -> Change:
    return lambda header, kept: kept.update(a=torch.tensor(numbers, dtype=dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_positions(-1, 3), "positions of a are not int32, not ascending, or outside 4 x 2"),
        (_positions(3, 3), "not ascending"),
        (_positions(7, 3), "not ascending"),
        (_positions(3, 8), "outside 4 x 2"),
        (_positions(0, 3, dtype=torch.int64), "not int32"),
        (_positions(0, 3, dtype=torch.float16), "not int32"),
        (lambda header, kept: kept.update(a=kept["a"][None]), "positions of a"),
        (lambda header, kept: kept.pop("a"), "'a' needs both a shape and positions"),
        (lambda header, kept: header["shapes"].pop("b"), "'b' needs both a shape and positions"),
        (lambda header, kept: header["shapes"].update(a=[4, 0]), "shapes.a.1: Input should be greater"),
        (lambda header, kept: header["shapes"].update(a=4), r"shapes\.a"),
        (lambda header, kept: header["shapes"].update(a=[4, "2"]), r"shapes\.a\.1"),
        (lambda header, kept: header.update(shapes=None), "shapes: "),
        (lambda header, kept: header.update(a_checksum=5), "a_checksum"),
        (lambda header, kept: header.update(colour="red"), "colour"),
    ],
)
def test_impossible_masks_are_refused_though_hashed_again(saved: Path, change: Change, message: str) -> None:
    rewrite(saved, change)
    with pytest.raises(PlanError, match=f"(?s)mask.safetensors is not a mask, or is damaged.*{message}"):
        load_mask(saved)


def test_a_possible_change_that_was_hashed_again_is_read(saved: Path) -> None:
    rewrite(saved, _positions(1, 2, 6))
    assert load_mask(saved).indices["a"].tolist() == [1, 2, 6]


@pytest.mark.parametrize("header", ["5", "null", "[]", "{", "[" * 100_000, "9" * 5000])
def test_a_header_that_is_none_is_refused(saved: Path, header: str) -> None:
    save_file({"a": torch.zeros(1)}, saved, {"apportion_mask": header})
    with pytest.raises(PlanError, match="is not a mask, or is damaged"):
        load_mask(saved)
