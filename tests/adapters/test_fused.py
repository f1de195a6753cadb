"""Stacked experts with LoRA: equal to transformers' own forward pass with merged weights, in every form and type."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from apportion.adapters.experts import ExpertLora
from apportion.adapters.factors import ExpertFactors
from apportion.adapters.routed_rows import RoutedExperts, SortedRows, joined
from apportion.discovery import find_sites
from apportion.experts.forms import known_form
from apportion.experts.grouped import grouped_low_rank
from apportion.experts.run import run_experts
from architectures import build

FORMS = ["olmoe", "gpt_oss", "openai_privacy_filter", "nemotron_h", "dbrx"]
TOP_K = 2


def _lora(
    name: str, dtype: torch.dtype = torch.float64, *, every: bool = False, alike: bool = False, dropout: float = 0.0
) -> ExpertLora:
    """Adapt some experts of a tiny model's last layer, other ones and other ranks in every projection, unless alike."""
    model = build(name)
    base = model.get_submodule(find_sites(model).blocks[-1].name).to(dtype).requires_grad_(False)
    layer = ExpertLora(base)
    form = known_form(base)
    planned = {}
    for number, projection in enumerate(form.projections):
        experts = tuple(range(form.num_experts)) if every else tuple(range(number % 2, form.num_experts, 2))
        ranks = tuple(1 + (expert + number) % 3 for expert in experts)
        planned[projection] = ExpertFactors(experts, ranks, tuple(0.5 + expert for expert in experts))
        if alike:
            planned[projection] = ExpertFactors((1, 3), (2, 2), (0.5, 2.0))
    torch.manual_seed(0)
    layer.add_adapter("default", planned, dropout)
    layer.set_adapter("default")
    for parameter in [*layer.lora_A.parameters(), *layer.lora_B.parameters()]:
        parameter.data.normal_(std=0.3)
    return layer.train()


def _inputs(layer: ExpertLora, tokens: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens, ids and weights; the first expert gets no token."""
    form = known_form(layer.base_layer)
    width = form.weights(layer.base_layer, next(iter(form.projections))).shape[2]
    logits = torch.randn(tokens, form.num_experts - 1)
    weights, ids = logits.softmax(-1).topk(TOP_K)
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    return hidden, ids + 1, weights.to(dtype).requires_grad_()


def _merged(layer: ExpertLora, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Run transformers' own forward pass on weights that hold the adapter, all known to autograd."""
    base, form = copy.deepcopy(layer.base_layer), known_form(layer.base_layer)
    if hasattr(base, "config"):
        base.config._experts_implementation = "eager"
    stacked = {name: base.get_parameter(name).detach().clone() for name in form.parameters}
    for projection, factors in layer.factors["default"].items():
        a, b = layer.lora_A["default"][projection], layer.lora_B["default"][projection]
        parameter = form.projections[projection].parameter
        delta = torch.zeros_like(form.view(stacked[parameter], projection))
        cut = zip(factors.by_expert(a).items(), factors.by_expert(b).values(), factors.scales, strict=True)
        for (expert, own_a), own_b, scale in cut:
            delta = delta.index_put((torch.tensor([expert]),), ((own_b.t() @ own_a) * scale).unsqueeze(0))
        whole = torch.zeros_like(stacked[parameter])
        form.view(whole, projection).copy_(delta)
        stacked[parameter] = stacked[parameter] + whole
    result: Tensor = torch.func.functional_call(base, stacked, (hidden, ids, weights))
    return result.view_as(hidden)


def _gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Give gradients of a fixed weighted sum."""
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((output * direction).sum(), inputs)


@pytest.mark.parametrize("planned", [{}, {"every": True}, {"alike": True}], ids=["some", "every", "alike"])
@pytest.mark.parametrize("path", ["fused", "composed"])
@pytest.mark.parametrize("name", FORMS)
def test_equals_the_models_own_experts_with_merged_weights(name: str, path: str, planned: dict[str, bool]) -> None:
    layer = _lora(name, **planned)
    hidden, ids, weights = _inputs(layer, tokens=20)
    trained = [*layer.lora_A.parameters(), *layer.lora_B.parameters(), hidden, weights]
    if path == "fused":
        found = layer(hidden, ids, weights)
    else:
        found = run_experts(layer.base_layer, hidden, ids, weights, partial(layer.adapted_product, ["default"]))
    expected = _merged(layer, hidden, ids, weights)
    tolerance = 1e-4 if name == "openai_privacy_filter" else 1e-9  # its own forward pass is in float32, whatever comes
    assert torch.allclose(found, expected, atol=tolerance)
    for one, other in zip(_gradients(found, trained), _gradients(expected, trained), strict=True):
        assert torch.allclose(one, other, atol=tolerance)
    with torch.no_grad():
        assert torch.allclose(layer(hidden, ids, weights), expected, atol=tolerance)


@pytest.mark.parametrize("planned", [{}, {"every": True}, {"alike": True}], ids=["some", "every", "alike"])
@pytest.mark.parametrize("name", FORMS)
def test_one_token_alone_equals_merged_weights_too(name: str, planned: dict[str, bool]) -> None:
    layer = _lora(name, **planned)
    tolerance = 1e-4 if name == "openai_privacy_filter" else 1e-9
    for _ in range(4):  # other experts every time
        hidden, ids, weights = (tensor.detach() for tensor in _inputs(layer, tokens=1))
        with torch.no_grad():
            assert torch.allclose(layer(hidden, ids, weights), _merged(layer, hidden, ids, weights), atol=tolerance)


def test_experts_with_the_same_terms_run_as_one_batch() -> None:
    """However rows are spread, every row of an expert finds its place, and rooms in a batch are equal."""
    layer = _lora("olmoe")
    _, ids, _ = _inputs(layer, tokens=200)
    terms = {name: list(layer._terms("default", name).values()) for name in layer.form.parameters}
    run = SortedRows(RoutedExperts(module=layer.base_layer, form=layer.form, ids_TK=ids, terms=terms))
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


def test_swiglu_in_closed_form_is_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _lora("olmoe", torch.float32)
    assert layer.form.is_swiglu
    assert not _lora("gpt_oss").form.is_swiglu
    inputs = _inputs(layer, tokens=20, dtype=torch.float32)
    trained = [*layer.lora_A.parameters(), *layer.lora_B.parameters(), inputs[0], inputs[2]]
    closed = _gradients(layer(*inputs), trained)
    monkeypatch.setattr(layer, "form", replace(layer.form, is_swiglu=False))
    for one, other in zip(closed, _gradients(layer(*inputs), trained), strict=True):
        assert torch.equal(one, other)


def test_gate_and_up_run_as_one_where_they_are_planned_alike() -> None:
    for alike, terms in ((True, 1), (False, 2)):
        layer = _lora("olmoe", alike=alike)
        assert len(joined(list(layer._terms("default", "gate_up_proj").values()))) == terms


def test_what_fills_a_block_touches_nothing() -> None:
    """A token too large for an expert that it is not routed to must not reach that expert's gradients."""
    layer = _lora("olmoe", torch.float32, every=True)
    hidden, _, weights = _inputs(layer, tokens=6, dtype=torch.float32)
    ids = torch.tensor([[1, 2]] + [[3, 4]] * 5)
    with torch.no_grad():
        hidden[0] = float("inf")
    for side, parameters in (("A", layer.lora_A), ("B", layer.lora_B)):
        for name, planned in layer.factors["default"].items():
            grad = _gradients(layer(hidden, ids, weights)[1:], [parameters["default"][name]])[0]
            assert planned.by_expert(grad)[3].isfinite().all(), (side, name)


def test_dropout_leaves_the_experts_alone_and_has_right_gradients() -> None:
    layer = _lora("olmoe", dropout=0.5)
    hidden, ids, weights = _inputs(layer, tokens=5)
    factors = [*layer.lora_A.parameters(), *layer.lora_B.parameters()]

    def run(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same mask
        output: Tensor = layer(inputs[0], ids, inputs[1])
        return output

    assert torch.autograd.gradcheck(run, (hidden, weights, *factors))
    torch.manual_seed(4)
    assert not torch.allclose(layer(hidden, ids, weights), run(hidden, weights))
    mean = torch.stack([layer(hidden, ids, weights).detach() for _ in range(3000)]).mean(0)
    layer.lora_B.zero_grad()
    with torch.no_grad():
        for parameter in layer.lora_B.parameters():
            parameter.zero_()
    zeros = torch.zeros_like(hidden)
    assert torch.allclose(layer(hidden, ids, weights), _merged(layer, hidden, ids, weights))
    assert torch.equal(layer(zeros, ids, weights), zeros)
    assert mean.isfinite().all()


def test_bfloat16_rows_in_blocks_equal_float32() -> None:
    """Products in half precision run past an expert's rows; what they write there must not stay."""
    exact = _lora("olmoe", torch.float32)
    hidden, ids, weights = _inputs(exact, tokens=150, dtype=torch.float32)
    half = copy.deepcopy(exact)
    half.base_layer.to(torch.bfloat16)
    rounded, rounded_w = hidden.detach().bfloat16().requires_grad_(), weights.detach().bfloat16().requires_grad_()
    found, expected = half(rounded, ids, rounded_w), exact(hidden, ids, weights)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected, atol=0.03 * float(expected.detach().abs().max()))
    own = _gradients(found, [rounded, rounded_w, *half.lora_A.parameters(), *half.lora_B.parameters()])
    plain = _gradients(expected, [hidden, weights, *exact.lora_A.parameters(), *exact.lora_B.parameters()])
    for one, other in zip(own, plain, strict=True):
        assert torch.linalg.vector_norm(one.float() - other) < 0.05 * torch.linalg.vector_norm(other)


@pytest.mark.parametrize("every", [False, True], ids=["some", "every"])
def test_the_path_of_a_gpu_never_waits_for_it(every: bool) -> None:
    """Tensors without data refuse whatever would need their values on the host."""
    layer = _lora("olmoe", torch.bfloat16, every=every)
    hidden, ids, weights = (tensor.detach().to("meta") for tensor in _inputs(layer, 32, torch.bfloat16))
    layer.to("meta")
    found = layer(hidden.requires_grad_(), ids, weights)
    found.sum().backward()
    assert hidden.grad.shape == found.shape == hidden.shape
    assert all(p.grad is not None for p in [*layer.lora_A.parameters(), *layer.lora_B.parameters()])


def test_factors_kept_in_float32_multiply_rows_in_the_rows_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's grouped product takes bfloat16; in float32 it would wait for every expert's rows."""
    layer = _lora("olmoe", torch.bfloat16)
    layer.lora_A.float(), layer.lora_B.float()
    seen: list[torch.dtype] = []

    def product(x: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        seen.extend((x.dtype, a.dtype, b.dtype))
        return grouped_low_rank(x, a, b, ends)

    monkeypatch.setattr("apportion.adapters.experts.grouped_low_rank", product)
    run_experts(
        layer.base_layer, *_inputs(layer, dtype=torch.bfloat16), partial(layer.adapted_product, ["default"])
    ).sum().backward()
    assert set(seen) == {torch.bfloat16}
    assert all(p.grad.dtype == torch.float32 for p in [*layer.lora_A.parameters(), *layer.lora_B.parameters()])


@pytest.mark.parametrize("alike", [False, True])
def test_compiles_with_the_graph_breaks_of_the_base(alike: bool) -> None:
    layer = _lora("olmoe", torch.float32, alike=alike)
    hidden, ids, weights = _inputs(layer, dtype=torch.float32)
    breaks = [
        torch._dynamo.explain(module)(hidden, ids, weights).graph_break_count for module in (layer.base_layer, layer)
    ]
    assert breaks[0] == breaks[1] == 0
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    trained = [*layer.lora_A.parameters(), *layer.lora_B.parameters(), hidden, weights]
    found, expected = compiled(hidden, ids, weights), layer(hidden, ids, weights)
    assert torch.allclose(found, expected, atol=1e-5)
    for one, other in zip(_gradients(found, trained), _gradients(expected, trained), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
