"""Layouts that ship with the package, and those that are kept in the user's cache."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from transformers import AutoConfig, OlmoeConfig

import apportion
from apportion.accounting import layout_of
from apportion.configurations import (
    EMBEDDED,
    config_source,
    keep_layout,
    known_configurations,
    known_layout,
    shipped_layout_file,
)
from apportion.discovery import find_sites
from tiny_models import build_tiny


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("APPORTION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a configuration."""
    OlmoeConfig(num_hidden_layers=2, num_experts=8).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", [EMBEDDED, *known_configurations()])
def test_shipped_layouts_are_what_discovery_finds(name: str) -> None:
    found = layout_of(AutoConfig.from_pretrained(config_source(name)))  # builds the model: an object has no cache
    assert known_layout(name) == found


def test_every_shipped_layout_is_of_a_shipped_configuration() -> None:
    files = {shipped_layout_file(name) for name in (EMBEDDED, *known_configurations())}
    assert files == set(shipped_layout_file(EMBEDDED).parent.iterdir())


def test_a_layout_is_kept_under_the_content_of_its_configuration(model: Path, cache: Path) -> None:
    assert known_layout(model) is None
    layout = layout_of(model)
    assert known_layout(model) == known_layout(model / "config.json") == layout
    OlmoeConfig(num_hidden_layers=3, num_experts=8).save_pretrained(model)
    assert known_layout(model) is None
    assert len(layout_of(model).blocks) == 3


def test_a_kept_layout_is_used(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = apportion.cost(model, "lora", rank=2)
    monkeypatch.setattr("apportion.models.sources.AutoConfig", None)
    assert apportion.cost(model, "lora", rank=2) == first


def test_a_damaged_layout_is_found_again(model: Path, cache: Path) -> None:
    layout = layout_of(model)
    (file,) = cache.rglob("*.json.gz")
    whole = file.read_bytes()
    for damaged in (b"", whole[:-9], b"text", gzip.compress(b"{}"), gzip.compress(b"[" * 10**6)):
        file.write_bytes(damaged)
        assert known_layout(model) is None
        assert layout_of(model) == layout
        assert file.read_bytes() == whole


def test_a_layout_of_another_architecture_than_the_profile_is_not_used(model: Path, cache: Path) -> None:
    other = find_sites(build_tiny("mixtral"))
    keep_layout(model, other)
    assert known_layout(model) == other
    layout = layout_of(model, "another fingerprint")
    assert layout != other
    assert known_layout(model) == layout


def test_a_cache_that_cannot_be_written_changes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("APPORTION_CACHE", str(tmp_path / "file"))
    assert len(layout_of(model).blocks) == 2


def test_names_without_a_configuration_are_not_known(cache: Path, tmp_path: Path) -> None:
    for name in ("organisation/model", "no such/../name", str(tmp_path / "missing"), tmp_path):
        assert known_layout(name) is None
