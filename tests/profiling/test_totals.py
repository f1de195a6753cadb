"""Partial totals: a damaged file is measured again, and a whole one is the measurement itself."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import apportion
from apportion.discovery import find_sites
from apportion.errors import ApportionWarning
from apportion.profiling import totals as totals_module
from apportion.profiling.totals import PartialFile, TaskTotals, remove_partial
from apportion.records.arrays import digest
from apportion.records.tensors import arrays_of


@pytest.fixture
def partial(tiny_model: nn.Module, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a finished measurement of two batches leaves."""
    path = tmp_path / "p.partial"
    measure(tiny_model, tokens, path)
    return path


def measure(model: nn.Module, tokens: Tensor, path: Path) -> apportion.Profile:
    """Profile two batches, and leave the partial totals."""
    batches = [{"input_ids": rows, "labels": rows} for rows in (tokens[:3], tokens[3:])]
    return apportion.profile(model, batches, sensitivity=True, partial=path, keep_partial=True)


def identity_of(path: Path) -> str:
    """Read what the totals are of."""
    with safe_open(path, "pt") as opened:
        return str(json.loads(opened.metadata()["apportion_partial"])["identity"])


def rewrite(path: Path, change: Any, *, resealed: bool = True) -> None:
    """Change a file's header and tensors, with a digest that fits them or with the old one."""
    with safe_open(path, "pt") as opened:
        header = json.loads(opened.metadata()["apportion_partial"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    before = header.pop("digest")
    change(header, tensors)
    header["digest"] = digest(header, arrays_of(tensors)) if resealed else before
    save_file(tensors, path, {"apportion_partial": json.dumps(header)})


def test_kept_totals_give_the_profile_without_the_model(tiny_model: nn.Module, tokens: Tensor, partial: Path) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the model ran")

    hook = tiny_model.register_forward_pre_hook(refuse)
    again = measure(tiny_model, tokens, partial)
    hook.remove()
    remove_partial(partial)
    assert not partial.exists()
    assert measure(tiny_model, tokens, partial).digest == again.digest


def test_totals_are_removed_unless_they_are_asked_for(tiny_model: nn.Module, tokens: Tensor, tmp_path: Path) -> None:
    apportion.profile(tiny_model, [{"input_ids": tokens}], partial=tmp_path / "p.partial")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::apportion.errors.ApportionWarning")
def test_no_flipped_bit_changes_what_is_read(tiny_model: nn.Module, partial: Path) -> None:
    layout, identity = find_sites(tiny_model), identity_of(partial).rpartition("/")[0]
    good = partial.read_bytes()
    whole = PartialFile(partial, identity).read(layout)
    assert whole["default"].batches == 2
    draw = random.Random(0)
    header_bytes = int.from_bytes(good[:8], "little") + 8
    places = [draw.randrange(header_bytes) for _ in range(700)] + [draw.randrange(len(good)) for _ in range(700)]
    taken = 0
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << draw.randrange(8)
        partial.write_bytes(damaged)
        found = PartialFile(partial, identity).read(layout)
        if found:
            taken += 1
            assert same(found, whole)
    assert taken < 50  # flips in the padding, or from a space to another blank


def same(one: dict[str, TaskTotals], other: dict[str, TaskTotals]) -> bool:
    """Compare totals number by number."""
    return one.keys() == other.keys() and all(
        torch.equal(part.counts, other[task].counts)
        and torch.equal(part.mass, other[task].mass)
        and (part.tokens, part.sequences, part.batches, part.seen, part.sensitivity)
        == (
            other[task].tokens,
            other[task].sequences,
            other[task].batches,
            other[task].seen,
            other[task].sensitivity,
        )
        for task, part in one.items()
    )


def test_a_changed_count_is_measured_again(tiny_model: nn.Module, tokens: Tensor, partial: Path) -> None:
    expected = measure(tiny_model, tokens, partial)
    rewrite(partial, lambda header, tensors: tensors["counts/default"].add_(1), resealed=False)
    with pytest.warns(ApportionWarning, match=r"p\.partial cannot be used, so everything is measured again"):
        again = measure(tiny_model, tokens, partial)
    assert again.digest == expected.digest


CHANGES: dict[str, Any] = {
    "no tasks": lambda header, tensors: header.update(tasks=None),
    "a list of tasks": lambda header, tensors: header.update(tasks=[1]),
    "no facts": lambda header, tensors: header.update(tasks={"default": {}}),
    "facts that are no mapping": lambda header, tensors: header.update(tasks={"default": 5}),
    "no identity": lambda header, tensors: header.pop("identity"),
    "negative tokens": lambda header, tensors: header["tasks"]["default"].update(tokens=-1),
    "tokens as text": lambda header, tensors: header["tasks"]["default"].update(tokens="9"),
    "half a batch": lambda header, tensors: header["tasks"]["default"].update(batches=0.5),
    "sensitivity as a list": lambda header, tensors: header["tasks"]["default"].update(sensitivity=[1.0]),
    "infinite sensitivity": lambda header, tensors: header["tasks"]["default"]["sensitivity"].update(
        {"model.layers.0.self_attn.q_proj": float("inf")}
    ),
    "sensitivity of an unknown site": lambda header, tensors: header["tasks"]["default"]["sensitivity"].update(x=1.0),
    "another shape": lambda header, tensors: tensors.update({"counts/default": torch.zeros(1, 2, dtype=torch.int64)}),
    "another type": lambda header, tensors: tensors.update({"mass/default": tensors["mass/default"].half()}),
    "negative counts": lambda header, tensors: tensors["counts/default"].neg_(),
    "mass that is not a number": lambda header, tensors: tensors["mass/default"].fill_(float("nan")),
    "no tensor": lambda header, tensors: tensors.pop("mass/default"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_impossible_totals_are_measured_again_though_resealed(tiny_model: nn.Module, partial: Path, name: str) -> None:
    identity = identity_of(partial).rpartition("/")[0]
    rewrite(partial, CHANGES[name])
    with pytest.warns(ApportionWarning, match="measured again"):
        assert PartialFile(partial, identity).read(find_sites(tiny_model)) == {}


@pytest.mark.parametrize(
    "header",
    ["5", "null", "{", "[" * 100_000, '{"identity": ' + "9" * 5000 + "}"],
    ids=["5", "null", "cut", "deep", "digits"],
)
def test_a_header_that_is_no_header_is_measured_again(tiny_model: nn.Module, partial: Path, header: str) -> None:
    save_file({"x": torch.zeros(2)}, partial, {"apportion_partial": header})
    with pytest.warns(ApportionWarning, match="measured again"):
        assert PartialFile(partial, "x").read(find_sites(tiny_model)) == {}


def test_a_folder_of_that_name_is_left_alone(tiny_model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "p.partial").mkdir()
    assert PartialFile(tmp_path / "p.partial", "x").read(find_sites(tiny_model)) == {}
    assert totals_module.own_partial(tmp_path / "p.partial") == tmp_path / "p.partial"
