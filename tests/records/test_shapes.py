"""Shapes: what adapters are made of, as their files say it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.counting import count, num_kept
from apportion.errors import PlanError
from apportion.records.placement import Placement
from apportion.records.shapes import (
    LowRank,
    Part,
    Routed,
    Shape,
    Sparse,
    lora_shape,
    register,
    shape_as_dict,
    shape_from_dict,
)
from apportion.records.site import Site

SITES = {f"s{number}": Site(f"s{number}", "dense", 0, "up", 8 + number, 16) for number in range(4)}
PLAIN = st.builds(LowRank, st.integers(1, 8), st.floats(0.1, 64))
SPARSE = st.builds(Sparse, st.integers(1, 8), st.floats(0.1, 64), st.floats(0.01, 0.99))
ROUTED = st.builds(
    lambda expert, num_experts, top_k: Routed(expert, num_experts, min(top_k, num_experts)),
    PLAIN | SPARSE,
    st.integers(2, 5),
    st.integers(1, 5),
)


@given(PLAIN | SPARSE | ROUTED)
def test_files_hold_shapes_whole(shape: Shape) -> None:
    assert shape_from_dict(shape_as_dict(shape)) == shape


@given(st.lists(PLAIN | SPARSE | ROUTED, min_size=1, max_size=4))
def test_counts_are_those_of_the_tensors(shapes: list[Shape]) -> None:
    placements = [Placement(f"s{number}", shape) for number, shape in enumerate(shapes)]
    trained = drawn = 0
    sparse: dict[float, int] = {}
    for placement in placements:
        site, rows = SITES[placement.site], placement.total_rank
        trained += placement.num_experts * site.in_features if placement.is_routed else 0
        if placement.sparsity:
            drawn += rows * site.in_features
            sparse[placement.sparsity] = sparse.get(placement.sparsity, 0) + rows * site.out_features
        else:
            trained += rows * (site.in_features + site.out_features)
    kept = sum(num_kept(entries, 1 - sparsity) for sparsity, entries in sparse.items())
    counts = count(placements, SITES)
    assert (counts.trained, counts.drawn, counts.indices) == (trained + kept, drawn, kept)
    assert counts.stored() == trained + kept
    assert counts.stored(with_drawn=True) == trained + kept + drawn
    assert count(placements, SITES, dense=True).trained == trained + sum(sparse.values())


def test_a_tensor_that_sites_share_counts_once() -> None:
    @register
    @dataclass(frozen=True)
    class Shared:
        kind: ClassVar[str] = "shared for a test"
        rank: int
        alpha: float
        lora_rank: ClassVar[int] = 2

        def parts(self, in_features: int, out_features: int) -> Iterator[Part]:
            yield Part(100, shared="A")
            yield Part(self.rank)

        def flops(self, in_features: int, out_features: int) -> int:
            return 2 * in_features

    placements = [Placement(name, Shared(2, 4.0)) for name in SITES]
    assert count(placements, SITES).trained == 100 + 2 * len(SITES)
    assert shape_from_dict(shape_as_dict(placements[0].shape)) == placements[0].shape
    with pytest.raises(ValueError, match="already"):
        register(type("Other", (), {"kind": "low_rank"}))


def test_one_expert_is_plain_and_no_sparsity_is_dense() -> None:
    assert lora_shape(2, 4.0) == LowRank(2, 4.0)
    assert lora_shape(2, 4.0, sparsity=0.5) == Sparse(2, 4.0, 0.5)
    assert lora_shape(2, 4.0, num_experts=3, top_k=2).lora_rank is None
    assert LowRank(2, 4.0).lora_rank == 2


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_impossible_sparsities_are_refused(sparsity: float) -> None:
    with pytest.raises(PlanError, match="sparsity"):
        Sparse(2, 4.0, sparsity)
