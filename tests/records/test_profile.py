"""Profiles: the file is whole, and the same profile again."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import apportion
from apportion.errors import ApportionError, MissingDependencyError, ProfileError
from apportion.records.arrays import digest
from apportion.records.profile import Profile
from apportion.records.tensors import arrays_of

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


@pytest.fixture
def profile(tiny_model: nn.Module, tokens: Tensor) -> Profile:
    return apportion.profile(
        tiny_model, {"a": [{"input_ids": tokens[:3]}], "b": [{"input_ids": tokens[3:]}]}, provenance={"data": "random"}
    )


def test_a_saved_profile_is_the_same_profile(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.safetensors")
    loaded = apportion.load_profile(tmp_path / "p.safetensors")
    assert loaded.digest == profile.digest
    assert loaded.layout == profile.layout
    assert loaded.tokens == profile.tokens
    assert loaded.provenance == profile.provenance
    assert loaded.provenance["versions"].keys() >= {"apportion", "torch", "transformers"}
    for task in profile.tasks:
        assert torch.equal(loaded.counts[task], profile.counts[task])
        assert torch.equal(loaded.routing_mass[task], profile.routing_mass[task])


def test_equal_inputs_give_equal_digests(profile: Profile, tiny_model: nn.Module, tokens: Tensor) -> None:
    again = apportion.profile(
        tiny_model, {"a": [{"input_ids": tokens[:3]}], "b": [{"input_ids": tokens[3:]}]}, provenance={"data": "random"}
    )
    assert again.digest == profile.digest


@pytest.mark.parametrize("keep", [0, 7, 200, -8])
def test_a_truncated_profile_is_refused(profile: Profile, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "p.safetensors"
    profile.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ProfileError, match="truncated or not a safetensors file"):
        apportion.load_profile(path)


def test_changed_counts_are_refused(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    profile.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["counts/a"][0, 0] += 1
    save_file(tensors, path, metadata)
    with pytest.raises(ProfileError, match="changed after it was written"):
        apportion.load_profile(path)
    del tensors["counts/a"]
    save_file(tensors, path, metadata)
    with pytest.raises(ProfileError, match="damaged"):
        apportion.load_profile(path)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ProfileError, match="not a profile"):
        apportion.load_profile(tmp_path / "x.safetensors")
    with pytest.raises(ProfileError, match=r"the profile .* does not exist"):
        apportion.load_profile(tmp_path / "none.safetensors")


def test_an_unknown_task_is_refused(profile: Profile) -> None:
    with pytest.raises(ProfileError, match="no task 'c'"):
        profile.of_task("c")


@pytest.mark.parametrize("error", [ProfileError("broken"), MissingDependencyError("tests", package="p", extra="e")])
def test_errors_can_be_pickled(error: ApportionError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


def _rewrite(path: Path, change: Change) -> None:
    """Change a profile, and hash it again."""
    with safe_open(path, "pt") as opened:
        header = json.loads(opened.metadata()["apportion_profile"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    header.pop("digest")
    change(header, tensors)
    save_file(tensors, path, {"apportion_profile": json.dumps(header | {"digest": digest(header, arrays_of(tensors))})})


IMPOSSIBLE: list[tuple[Change, str]] = [
    (lambda header, tensors: tensors["counts/a"].neg_(), "negative or not finite"),
    (lambda header, tensors: tensors["routing_mass/a"].fill_(float("inf")), "negative or not finite"),
    (lambda header, tensors: tensors.update({"counts/a": tensors["counts/a"].int()}), "totals have dtype int32"),
    (lambda header, tensors: tensors.update({"counts/a": tensors["counts/a"][:1].clone()}), r"shape \(1, 8\)"),
    (lambda header, tensors: tensors.pop("routing_mass/b"), "missing or belong to no task: 'routing_mass/b'"),
    (lambda header, tensors: header["tokens"].update(a=-1), r"tokens\.a: Input should be greater"),
    (lambda header, tensors: header["tokens"].update(a="9"), r"tokens\.a: Input should be a valid integer"),
    (lambda header, tensors: header.update(tokens=[1]), "tokens: "),
    (lambda header, tensors: header["sensitivity"].update(c={}), "sensitivity for task 'c'"),
    (lambda header, tensors: header["sensitivity"].update(a={"x": 1.0}), "sensitivity for 'x', which the model"),
    (lambda header, tensors: header["sensitivity"].update(a={"x": float("inf")}), r"sensitivity\.a\.x"),
    (lambda header, tensors: header["sensitivity"].update(a={}), "no sensitivity for 'model.layers.0"),
    (lambda header, tensors: header["layout"].update(base_parameters=-5), r"layout\.base_parameters"),
    (lambda header, tensors: header["layout"]["others"][0].update(in_features=1e400), r"layout\.others\.0\.in_feat"),
    (lambda header, tensors: header["layout"]["others"][0].update(expert=3), "others contains an expert's site"),
    (
        lambda header, tensors: header["layout"]["others"].append(header["layout"]["others"][0]),
        "two sites have the same name",
    ),
    (lambda header, tensors: header["layout"]["blocks"][0].update(num_experts=10**9), "sites, more than any model"),
    (lambda header, tensors: header["layout"]["blocks"][0].update(num_experts=4), "totals for experts that the layer"),
    (lambda header, tensors: header["layout"].update(blocks=5), r"layout\.blocks"),
    (lambda header, tensors: header.update(provenance=[[]] * 3), "provenance"),
]


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_impossible_profiles_are_refused_though_hashed_again(
    profile: Profile, tmp_path: Path, change: Change, message: str
) -> None:
    path = tmp_path / "p.safetensors"
    profile.save(path)
    _rewrite(path, change)
    with pytest.raises(
        ProfileError, match=rf"(?s)the profile .*p\.safetensors (is damaged|has impossible measurements).*{message}"
    ):
        apportion.load_profile(path)


@pytest.mark.parametrize("header", ["5", "null", "[]", "{", "[" * 100_000, "9" * 5000])
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: str) -> None:
    save_file({"counts/a": torch.zeros(2)}, tmp_path / "p.safetensors", {"apportion_profile": header})
    with pytest.raises(ProfileError, match="is damaged"):
        apportion.load_profile(tmp_path / "p.safetensors")
