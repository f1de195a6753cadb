"""Profiles: the file is whole, and the same profile again."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import apportion
from apportion.errors import ApportionError, MissingDependencyError, ProfileError
from apportion.records.profile import Profile


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
    with pytest.raises(ProfileError, match="there is no profile"):
        apportion.load_profile(tmp_path / "none.safetensors")


def test_an_unknown_task_is_refused(profile: Profile) -> None:
    with pytest.raises(ProfileError, match="no task 'c'"):
        profile.of_task("c")


@pytest.mark.parametrize("error", [ProfileError("broken"), MissingDependencyError("tests", package="p", extra="e")])
def test_errors_can_be_pickled(error: ApportionError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))
