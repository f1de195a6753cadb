"""Count where a model routes its tokens, with a hook on every experts module and nothing else."""

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

# Shapes: T tokens, K experts a token.

Batch = Mapping[str, Any]
Inputs = dict[str, Tensor]
Choice = Callable[[ExpertBlock, tuple[Any, ...], dict[str, Any], Any], tuple[Tensor, Tensor]]


RunBatch = Callable[[Batch], None]


@contextmanager
def routing_counter(model: nn.Module, layout: Layout, totals: TaskTotals) -> Iterator[RunBatch]:
    """Count routing alone: one forward pass a batch without gradients, and without the head where the model allows it.

    Padding is left out: only positions with ``attention_mask`` 1 count. The model's mode, its gradients' state and its
    hooks are as before at the end, also after an error.

    Args:
        model: The model, with or without adapters.
        layout: Its sites.
        totals: What every batch is added to.

    Yields:
        A function that runs one batch forward.

    Raises:
        ProfileError: a layer's router cannot be found.
    """
    backbone = base_model(model)
    backbone = getattr(backbone, "base_model", backbone)  # without the head, whose logits nobody reads
    with evaluation_mode(model), counting_hooks(model, layout, totals) as take, torch.no_grad():
        yield lambda batch: backbone(**without_labels(take(batch)), use_cache=False)


@contextmanager
def counting_hooks(model: nn.Module, layout: Layout, totals: TaskTotals) -> Iterator[Callable[[Batch], Inputs]]:
    """Count every selection of every forward pass while the block is open.

    Args:
        model: The model, with or without adapters.
        layout: Its sites.
        totals: What is added to.

    Yields:
        A function that takes a batch, to be called before the batch is run: it checks it, notes its padding and gives
        its tensors on the model's device.

    Raises:
        ProfileError: a layer's router cannot be found.
    """
    called = {path: module for path, module, _ in walk_modules(model)}
    own = {path: module for path, _, module in walk_modules(model)}
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
            form = form_of(own[block.name])
            at_experts = form is not None and form.called == "routed"
            seen_at = block.name if at_experts else find_router(block.name, block.num_experts, own)
            if seen_at is None:
                raise ProfileError(f"the router of {block.name} in {layout.model_class} cannot be found.")
            choice = _passed_to_experts if at_experts else _selected_by_router
            stack.enter_context(_counting(called[seen_at], choice, block, totals, row, mask))
        yield take


@dataclass
class _Mask:
    """The attention mask of the batch under way, shape (sequences, positions)."""

    value: Tensor = field(default_factory=lambda: torch.empty(0))


def without_labels(inputs: Inputs) -> Inputs:
    """Leave out what only the loss reads."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def _inputs(batch: Batch, device: torch.device) -> Inputs:
    """Check a batch and put its tensors on the model's device."""
    if "input_ids" not in batch:
        raise DataError("a batch has no input_ids.", found=", ".join(batch) or "nothing")
    inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape != inputs["input_ids"].shape:
        raise DataError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(inputs['input_ids'].shape)}.",
            fix="give one mask value a token",
        )
    return inputs


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and give each its own mode back, also after an error.

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
    """Count one layer's selections, at its experts or at its router, while the block is open."""

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
        ids, weights = ids[weights != 0], weights[weights != 0]  # a weight of 0 says that the slot was left empty
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
    """Read the choice off what the experts are called with."""
    named = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
    return named["top_k_index"], named["top_k_weights"]


def _selected_by_router(
    block: ExpertBlock, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any
) -> tuple[Tensor, Tensor]:
    """Read the choice off what the router returns.

    It is the router's own ids and weights, or scores of all experts that are zero where none was selected, or the
    softmax top-k of its logits.
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
        f"the router of {block.name} returns neither expert ids nor one logit an expert, so its choice cannot be "
        "counted.",
        fix="use the architecture's own class in transformers",
    )
