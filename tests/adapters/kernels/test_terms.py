"""Low-rank terms of one parameter are joined where that is exact."""

from __future__ import annotations

from adapted_experts import adapted_experts
from apportion.adapters.kernels.terms import join_terms


def test_gate_and_up_run_as_one_where_they_are_planned_alike() -> None:
    for alike, terms in ((True, 1), (False, 2)):
        layer = adapted_experts("olmoe", alike=alike)
        assert len(join_terms(list(layer._terms("default", "gate_up_proj").values()))) == terms
