"""Count where a model routes its tokens, with a hook on every experts module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apportion.discovery import base_model, execution_device, find_router, walk_modules
from apportion.errors import DataError, ProfileError
from apportion.experts.forms import form_of
from apportion.profiling.totals import TaskTotals
from apportion.records.site import ExpertBlock, Layout

# Shapes: T tokens, K experts per token.

Batch = Mapping[str, Any]
Inputs = dict[str, Tensor]
Choice = Callable[[ExpertBlock, tuple[Any, ...], dict[str, Any], Any], tuple[Tensor, Tensor]]


RunBatch = Callable[[Batch], None]


@contextmanager
def routing_counter(model: nn.Module, layout: Layout, totals: TaskTotals) -> Iterator[RunBatch]:
    """Count only routing: one forward pass per batch without gradients, and without the head if possible.

    Padding is ignored: only positions with ``attention_mask`` 1 count. At the end, also after an error, the model's
    mode and hooks are restored.

    Args:
        model: The model, with or without adapters.
        layout: Its sites.
        totals: Totals that every batch is added to.

    Yields:
        A function that runs one batch.

    Raises:
        ProfileError: a layer's router cannot be found.
    """
    backbone = base_model(model)
    backbone = getattr(backbone, "base_model", backbone)  # without the head, whose logits are not needed
    with evaluation_mode(model), counting_hooks(model, layout, totals) as take, torch.no_grad():
        yield lambda batch: backbone(**without_labels(take(batch)), use_cache=False)


@contextmanager
def counting_hooks(model: nn.Module, layout: Layout, totals: TaskTotals) -> Iterator[Callable[[Batch], Inputs]]:
    """Count every selection of every forward pass inside the context.

    Args:
        model: The model, with or without adapters.
        layout: Its sites.
        totals: Totals that are added to.

    Yields:
        A function to call before a batch is run. It checks the batch, records its padding and returns its tensors on
        the model's device.

    Raises:
        ProfileError: a layer's router cannot be found.
    """
    called = {path: module for path, module, _ in walk_modules(model)}
    base_modules = {path: module for path, _, module in walk_modules(model)}
    device = execution_device(model)
    mask = _Mask()

    def take(batch: Batch) -> Inputs:
        inputs = _inputs(batch, device)
        mask.value = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        totals.tokens += int(mask.value.sum())
        totals.sequences += int(mask.value.shape[0])
        return inputs

    with ExitStack() as stack:
        for row, block in enumerate(layout.blocks):
            form = form_of(base_modules[block.name])
            at_experts = form is not None and form.called == "routed"
            hooked = block.name if at_experts else find_router(block.name, block.num_experts, base_modules)
            if hooked is None:
                raise ProfileError(f"the router of {block.name} in {layout.model_class} cannot be found.")
            choice = _passed_to_experts if at_experts else _selected_by_router
            stack.enter_context(_counting(called[hooked], choice, block, totals, row, mask))
        yield take


@dataclass
class _Mask:
    """The attention mask of the current batch, shape (sequences, positions)."""

    value: Tensor = field(default_factory=lambda: torch.empty(0))


def without_labels(inputs: Inputs) -> Inputs:
    """Return the inputs without labels."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def _inputs(batch: Batch, device: torch.device) -> Inputs:
    """Check a batch and move its tensors to the model's device."""
    if "input_ids" not in batch:
        raise DataError("a batch has no input_ids.", found=", ".join(batch) or "nothing")
    inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape != inputs["input_ids"].shape:
        raise DataError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(inputs['input_ids'].shape)}.",
            fix="give one mask value per token",
        )
    return inputs


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and restore each module's mode at the end.

    Args:
        model: Any model.

    Yields:
        Nothing.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _counting(
    module: nn.Module, choice: Choice, block: ExpertBlock, totals: TaskTotals, row: int, mask: _Mask
) -> Iterator[None]:
    """Count one layer's selections, at its experts or at its router, inside the context."""

    def add(ids_TK: Tensor, weights_TK: Tensor) -> None:
        ids_TK = ids_TK.reshape(-1, ids_TK.shape[-1])
        weights_TK = weights_TK.reshape(-1, weights_TK.shape[-1])
        real_T = mask.value.reshape(-1) != 0
        if len(real_T) != len(ids_TK):
            raise ProfileError(
                f"layer {block.layer} routed {len(ids_TK)} positions of a batch of {len(real_T)}.",
                place=block.name,
                fix="profile with batches of one sequence, without padding",
            )
        ids = ids_TK[real_T].reshape(-1).cpu()
        weights = weights_TK.detach()[real_T].reshape(-1).double().cpu()
        ids, weights = ids[weights != 0], weights[weights != 0]  # a weight of 0 marks an empty slot
        width = totals.counts.shape[1]
        totals.counts[row] += torch.bincount(ids, minlength=width)[:width]
        totals.mass[row] += torch.bincount(ids, weights=weights, minlength=width)[:width]

    def after(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        add(*choice(block, args, kwargs, output))

    handle = module.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _passed_to_experts(
    _block: ExpertBlock, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
) -> tuple[Tensor, Tensor]:
    """Read the selection from the experts' inputs."""
    named = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
    return named["top_k_index"], named["top_k_weights"]


def _selected_by_router(
    block: ExpertBlock, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any
) -> tuple[Tensor, Tensor]:
    """Read the selection from the router's output.

    The output contains expert ids and weights, or scores of all experts that are zero for unselected ones, or logits,
    of which the softmax top-k is taken.
    """
    tensors = [value for value in (output if isinstance(output, tuple) else (output,)) if isinstance(value, Tensor)]
    for ids in tensors:
        if not ids.is_floating_point() and ids.ndim >= 2:
            weights = next((t for t in tensors if t.is_floating_point() and t.shape == ids.shape), None)
            return ids, torch.ones_like(ids, dtype=torch.float32) if weights is None else weights
    if block.top_k:
        for scores in tensors:
            if scores.shape[-1] == block.num_experts and int((scores != 0).sum(-1).max()) <= block.top_k:
                weights, ids = scores.topk(block.top_k, dim=-1)
                return ids, weights
        if len(tensors) == 1 and tensors[0].shape[-1] == block.num_experts:
            weights, ids = tensors[0].float().softmax(-1).topk(block.top_k, dim=-1)
            return ids, weights
    raise ProfileError(
        f"the router of {block.name} returns neither expert ids nor one logit per expert, so its selections cannot be "
        "counted.",
        fix="use the architecture's class in transformers",
    )
