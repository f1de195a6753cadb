"""Stacked experts of tiny models with random adapters, their inputs, and what they must equal."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from apportion.adapters.hosts.experts import ExpertLora
from apportion.adapters.shapes.experts import ExpertShapes
from apportion.adapters.shapes.low_rank_stack import LowRankStack, low_rank_stack
from apportion.adapters.specs import ExpertFactors
from apportion.discovery import find_sites
from apportion.experts.forms import known_form
from architectures import build

TOP_K = 2


def adapted_experts(
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
    shapes = ExpertShapes({"low_rank": low_rank_stack(planned, layer.places())})
    layer.add_adapter("default", shapes, dropout)
    layer.set_adapter("default")
    for parameter in [*layer.lora_shape.parameters()]:
        parameter.data.normal_(std=0.3)
    return layer.train()


def stack_of(layer: ExpertLora) -> LowRankStack:
    """Return the low-rank shapes of a layer's experts."""
    stack = layer.lora_shape["default"].low_rank
    assert isinstance(stack, LowRankStack)
    return stack


def routed_inputs(
    layer: ExpertLora, tokens: int = 9, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens, ids and weights; the first expert gets no token."""
    form = known_form(layer.base_layer)
    width = form.weights(layer.base_layer, next(iter(form.projections))).shape[2]
    logits = torch.randn(tokens, form.num_experts - 1)
    weights, ids = logits.softmax(-1).topk(TOP_K)
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    return hidden, ids + 1, weights.to(dtype).requires_grad_()


def run_merged(layer: ExpertLora, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Run transformers' own forward pass on weights that hold the adapter, all known to autograd."""
    base, form = copy.deepcopy(layer.base_layer), known_form(layer.base_layer)
    if hasattr(base, "config"):
        base.config._experts_implementation = "eager"
    stacked = {name: base.get_parameter(name).detach().clone() for name in form.parameters}
    stack = stack_of(layer)
    for projection, factors in stack.planned.items():
        a, b = stack.lora_A[projection], stack.lora_B[projection]
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


def gradients_of(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Give gradients of a fixed weighted sum."""
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((output * direction).sum(), inputs)
