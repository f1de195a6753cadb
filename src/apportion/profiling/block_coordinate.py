"""Sensitivity as in LoRA-SMoE's release: one layer per step, dense gradients, and weights that are updated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from apportion.discovery import base_model, walk_modules
from apportion.errors import ConfigurationError
from apportion.experts.forms import known_form
from apportion.experts.weights import stacked_weight
from apportion.linear_forms import is_quantised
from apportion.profiling.routing import Batch, RunBatch, counting_hooks, evaluation_mode
from apportion.profiling.sensitivity import check_loss, frozen, rows_of, summed_sample_losses
from apportion.profiling.totals import TaskTotals
from apportion.records.site import ExpertBlock, Layout

CLIP_NORM = 1.0
LEARNING_RATE = 1e-5


@contextmanager
def block_coordinate_meter(
    model: nn.Module, layout: Layout, totals: TaskTotals, *, lr: float = LEARNING_RATE
) -> Iterator[RunBatch]:
    """Measure squared gradient norms as the released code of LoRA-SMoE does, to compare with `gradient_meter`.

    Every row is one step. Steps cycle through the layers, from the last to the first. A step unfreezes its layer's
    matrices, clips their joint gradient to norm 1, adds their squared norms to the totals, and updates them with one
    step of Adam. So different layers see different rows and different weights. All weights are restored at the end.

    Args:
        model: The model, without adapters.
        layout: Its sites.
        totals: Totals that every row is added to.
        lr: Learning rate of the step.

    Yields:
        A function that runs the rows of one batch one by one.

    Raises:
        ConfigurationError: the weights are quantised.

    Cost: one forward and one backward pass per row, for one layer; a copy of every updated matrix.

    Source: LoRA-SMoE, arXiv:2505.06272, released code.
    Differs: the learning rate is not published.
    """
    modules: dict[str, Any] = {path: base for path, _, base in walk_modules(model)}
    layers = _parameters_by_layer(layout, modules)
    order = sorted(layers, reverse=True)
    originals: dict[nn.Parameter, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(frozen(model))
        take = stack.enter_context(counting_hooks(model, layout, totals))
        stack.callback(_restore, originals)

        def run_batch(batch: Batch) -> None:
            for row in rows_of(batch):
                layer = order[totals.sequences % len(order)]
                inputs = take(row)
                parameters = list(layers[layer])
                originals.update({p: p.detach().clone() for p in parameters if p not in originals})
                for parameter in parameters:
                    parameter.requires_grad = True
                with torch.enable_grad():
                    loss = summed_sample_losses(base_model(model), inputs)
                check_loss(loss, totals.sequences)
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
                totals.add_sensitivity(_norms(layers[layer], modules))
                torch.optim.Adam(parameters, lr=lr).step()
                for parameter in parameters:
                    parameter.grad = None
                    parameter.requires_grad = False

        yield run_batch


def _parameters_by_layer(layout: Layout, modules: dict[str, Any]) -> dict[int, dict[nn.Parameter, str | ExpertBlock]]:
    """Return each layer's weights, with the site or expert block that each belongs to."""
    layers: dict[int, dict[nn.Parameter, str | ExpertBlock]] = defaultdict(dict)
    for site in layout.sites():
        if site.storage == "linear":
            weight = getattr(modules[site.name], "weight", None)
            if is_quantised(modules[site.name]) or type(weight) is not nn.Parameter:
                raise _quantised(site.name)
            layers[site.layer][weight] = site.name
    for block in layout.blocks:
        if block.storage == "fused":
            base = modules[block.name]
            for parameter in known_form(base).parameters:
                if not stacked_weight(base, parameter).is_exact:
                    raise _quantised(f"{block.name}.{parameter}")
                layers[block.layer][attrgetter(parameter)(base)] = block
    return dict(layers)


def _quantised(first: str) -> ConfigurationError:
    """Return the error for weights that cannot be updated."""
    return ConfigurationError(
        "block-coordinate updates weights, but those of this model are quantised.",
        details={"first": first},
        fix="measure with the one-pass procedure",
    )


def _norms(owners: dict[nn.Parameter, str | ExpertBlock], modules: dict[str, Any]) -> dict[str, float]:
    """Compute squared norms from the dense gradients."""
    norms: dict[str, float] = {}
    for parameter, owner in owners.items():
        if parameter.grad is None:
            continue
        if isinstance(owner, str):
            norms[owner] = float(parameter.grad.float().square().sum())
            continue
        base = modules[owner.name]
        form = known_form(base)
        for projection in owner.projections:
            if attrgetter(form.projections[projection.suffix].parameter)(base) is parameter:
                for expert, grad_OI in enumerate(form.view(parameter.grad, projection.suffix)):
                    norms[owner.site(expert, projection).name] = float(grad_OI.float().square().sum())
    return norms


@torch.no_grad()
def _restore(originals: dict[nn.Parameter, Tensor]) -> None:
    """Restore all weights."""
    for parameter, before in originals.items():
        parameter.copy_(before)
        parameter.grad = None
        parameter.requires_grad = False
