"""Rows sorted by expert: every row has its place, and experts with the same terms run together."""

from __future__ import annotations

import torch

from adapted_experts import adapted_experts, routed_inputs
from apportion.adapters.kernels.cpu.matrices import FrozenMatrices
from apportion.adapters.kernels.cpu.routed import RoutedExperts
from apportion.adapters.kernels.cpu.sorted_rows import SortedRows


def test_experts_with_the_same_terms_run_as_one_batch() -> None:
    """However rows are spread, every row of an expert finds its place, and rooms in a batch are equal."""
    layer = adapted_experts("olmoe")
    torch.manual_seed(2)
    _, ids, _ = routed_inputs(layer, tokens=200)
    terms = {name: list(layer._terms("default", name).values()) for name in layer.form.parameters}
    matrices = {name: FrozenMatrices.of(*layer.form.matrices(layer.base_layer, name)) for name in layer.form.parameters}
    run = SortedRows(RoutedExperts(layer.base_layer, layer.form, matrices, ids, terms))
    assert len(run.chunks) > 1
    assert all(len(chunk.experts) > 1 for chunk in run.chunks)
    for chunk in run.chunks:
        planned = {
            number for number, (_, term) in enumerate(run.terms) if set(chunk.experts) & set(term.planned.experts)
        }
        assert planned == set(chunk.terms)
        assert not planned or set(chunk.sizes) == {chunk.room}
        for expert, start, end in zip(chunk.experts, [chunk.start, *chunk.ends], chunk.ends, strict=False):
            own = run.tokens[start:end]
            assert set(own.tolist()) == set((ids == expert).any(1).nonzero()[:, 0].tolist())
            places = run.place_TK[ids == expert]
            assert len(set(places.tolist())) == len(places)
            assert ((places >= start) & (places < end)).all()
