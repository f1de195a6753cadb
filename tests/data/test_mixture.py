"""Mixtures: stated shares, and nothing lost where none are stated."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.data.mixture import mix, parse_weights
from apportion.errors import ConfigurationError


def _rows(**sizes: int) -> dict[str, list[dict[str, str]]]:
    return {name: [{"text": f"{name}{number}"} for number in range(size)] for name, size in sizes.items()}


def test_without_weights_every_row_comes_once() -> None:
    rows = _rows(a=3, b=5)
    assert mix(rows) == rows["a"] + rows["b"]


@given(a=st.integers(1, 40), b=st.integers(1, 40), weight=st.floats(0.1, 10), seed=st.integers(0, 9))
def test_shares_are_the_weights(a: int, b: int, weight: float, seed: int) -> None:
    mixed = mix(_rows(a=a, b=b), {"a": weight, "b": 1.0}, seed)
    counts = Counter(row["text"][0] for row in mixed)
    assert abs(counts["a"] - (a + b) * weight / (weight + 1)) <= 1
    assert mixed == mix(_rows(a=a, b=b), {"a": weight, "b": 1.0}, seed)
    repeats = Counter(row["text"] for row in mixed if row["text"][0] == "a").values()
    assert max(repeats) - min(repeats) <= 1  # a small task is gone through evenly


def test_weights_are_read() -> None:
    assert parse_weights("a=2, b=0.5") == {"a": 2.0, "b": 0.5}
    assert parse_weights(None) is None


@pytest.mark.parametrize("text", ["a", "a=x", "a=1,b"])
def test_weights_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="TASK=NUMBER"):
        parse_weights(text)


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 0.0}])
def test_weights_must_fit_the_tasks(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=r"'b'|'c'"):
        mix(_rows(a=3, b=3), weights)
