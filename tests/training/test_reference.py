"""Training through the fused experts against training through transformers' own, on weights that hold the adapter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import apportion
from adapted_experts import stack_of
from apportion.adapters.hosts.experts import ExpertLora
from tiny_models import build_tiny, checkpoint_activations

STEPS = 50


def _merged_forward(self: ExpertLora, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Run the wrapped module with ``W + scale·BA`` written out for every planned expert."""
    base = self.base_layer
    stacked = {name: base.get_parameter(name).detach() for name in self.form.parameters}
    stack = stack_of(self)
    for projection, factors in stack.planned.items():
        a, b = stack.lora_A[projection], stack.lora_B[projection]
        name = self.form.projections[projection].parameter
        whole = torch.zeros_like(stacked[name])
        cut = zip(factors.by_expert(a).items(), factors.by_expert(b).values(), factors.scales, strict=True)
        for (expert, own_a), own_b, scale in cut:
            self.form.view(whole, projection)[expert] = (own_b.t() @ own_a) * scale
        stacked[name] = stacked[name] + whole
    result: Tensor = torch.func.functional_call(base, stacked, (hidden, ids, weights))
    return result


def _losses(model: Any, batches: list[Tensor]) -> list[float]:
    """Train with AdamW, and give every step's loss."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.01)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_fifty_steps_give_the_losses_of_the_plain_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build_tiny(name)
    draw = torch.Generator().manual_seed(0)
    data = [torch.randint(2, 12, (4, 16), generator=draw) for _ in range(4)]
    profile = apportion.profile(base, [{"input_ids": batch} for batch in data])
    plan = apportion.plan(profile, "hellora", hot=2, rank=4)
    batches = [data[step % len(data)] for step in range(STEPS)]
    own = _losses(apportion.apply(copy.deepcopy(base), plan), batches)
    monkeypatch.setattr(ExpertLora, "forward", _merged_forward)
    plain = _losses(apportion.apply(copy.deepcopy(base), plan), batches)
    assert own[-1] < own[0] - 0.3  # something was learned
    assert own == pytest.approx(plain, abs=1e-4)


class _Keep:
    """Note every tensor that autograd saves."""

    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

    def __call__(self, tensor: Tensor) -> Tensor:
        self.kept.append(tensor)
        return tensor


def test_no_copy_of_expert_weights_is_kept_or_made() -> None:
    """With or without gradient checkpointing, what a backward pass keeps of the size of the weights is the weights."""
    base = build_tiny("olmoe")
    tokens = torch.randint(2, 60, (1, 4))
    plan = apportion.plan(apportion.profile(base, [{"input_ids": tokens}]), "hellora", hot=2, rank=2)
    model = apportion.apply(base, plan).train()
    layers = [module for module in model.modules() if isinstance(module, ExpertLora)]
    stacks = {p.untyped_storage().data_ptr(): p for layer in layers for p in layer.base_layer.parameters()}
    smallest = min(p.numel() for p in stacks.values())
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            checkpoint_activations(model)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(_Keep(kept), lambda tensor: tensor):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        large = [tensor for tensor in kept if tensor.numel() >= smallest]
        assert all(tensor.untyped_storage().data_ptr() in stacks for tensor in large)
        assert checkpointing or large
        assert all(p.grad is None for p in stacks.values())
