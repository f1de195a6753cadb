"""Gradient sensitivity of every weight matrix, from one forward and one backward pass per batch, weights frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from apportion.compat.accelerate import forward_attribute
from apportion.discovery import base_model, walk_modules
from apportion.errors import DataError, ProfileError
from apportion.experts.forms import known_form
from apportion.experts.run import AdaptedExperts, base_product, run_experts, token_of_rows
from apportion.profiling.norms import Rows, expert_squared_norms
from apportion.profiling.routing import Batch, Inputs, RunBatch, counting_hooks, evaluation_mode
from apportion.profiling.totals import TaskTotals
from apportion.records.site import Layout, Site

# Shapes: N samples, P positions, T = N·P tokens, K experts per token, S = T·K routed rows sorted by expert.

IGNORED = -100


@contextmanager
def gradient_meter(model: nn.Module, layout: Layout, totals: TaskTotals) -> Iterator[RunBatch]:
    """Measure routing and the squared gradient norm of every matrix, in one forward and one backward pass per batch.

    A sample's loss is the mean over its labelled tokens. A batch may have several samples; norms are computed per
    sample. No weight gradient is formed: hooks keep a matrix's input until the gradient of its output arrives. Routers
    that are not linear layers are skipped. Parameters, modes and hooks are restored at the end.

    Args:
        model: The model, with or without adapters.
        layout: Its sites.
        totals: Totals that every batch is added to.

    Yields:
        A function that runs one batch forward and backward.

    Raises:
        DataError: a batch has no labelled token.
        ProfileError: the loss is not finite, or a matrix was not used in the expected way.

    Cost: the backward pass takes about two forward passes, plus P (in + out) multiply-adds per token and matrix.

    Source: LoRA-SMoE, arXiv:2505.06272, sensitivity; the Gram identity is elementary.
    Differs: frozen weights, no clipping, and every layer sees every sample (see `block_coordinate_meter`).
    """
    meter = _Meter(layout)
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(frozen(model))
        take = stack.enter_context(counting_hooks(model, layout, totals))
        stack.enter_context(_meter_hooks(model, layout, meter))
        # listed experts receive rows without the samples they belong to
        one_by_one = any(block.storage == "linear" for block in layout.blocks)

        def run_batch(batch: Batch) -> None:
            for part in rows_of(batch) if one_by_one else (batch,):
                inputs = take(part)
                meter.begin(inputs)
                with torch.enable_grad():
                    loss = summed_sample_losses(base_model(model), inputs)
                    check_loss(loss, totals.sequences)
                    torch.autograd.backward(loss)
                totals.add_sensitivity(meter.end())

        yield run_batch


def summed_sample_losses(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the sum of the samples' losses, each the mean over the sample's labelled tokens.

    Args:
        model: The model, unwrapped from `PeftModel`.
        inputs: A batch with ``labels`` (-100 for ignored positions).

    Returns:
        A scalar in float32.

    Raises:
        DataError: there is no labelled token.
    """
    if "labels" not in inputs:
        raise DataError("a batch has no labels, and sensitivity needs a loss.", fix="give labels, -100 where ignored")
    targets_NP = inputs["labels"][:, 1:]
    labelled_NP = targets_NP != IGNORED
    if not bool(labelled_NP.any()):
        raise DataError("a batch has no labelled token.", fix="raise --max-length")
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**unlabelled, use_cache=False).logits[:, :-1][labelled_NP]
    losses = functional.cross_entropy(logits.float(), targets_NP[labelled_NP], reduction="none")
    weights_N = 1.0 / labelled_NP.sum(1).clamp(min=1)
    return (losses * weights_N[labelled_NP.nonzero()[:, 0]]).sum()


def check_loss(loss: Tensor, sample: int) -> None:
    """Raise an error if the loss is not finite."""
    if not bool(torch.isfinite(loss)):
        raise ProfileError(
            f"the loss is {float(loss.detach())} within the first {sample} samples, so no gradient can be measured.",
            fix="check these rows, or load the model in float32 or bfloat16",
        )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters, and let gradients flow back to the embeddings' output.

    Args:
        model: Any model with input embeddings.

    Yields:
        Nothing.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings: Any = base_model(model)
    handle = embeddings.get_input_embeddings().register_forward_hook(
        lambda _module, _args, output: output.detach().requires_grad_()
    )
    try:
        for parameter in trainable:
            parameter.requires_grad = False
        yield
    finally:
        handle.remove()
        for parameter in trainable:
            parameter.requires_grad = True


class _Meter:
    """Collects the squared norms of the current batch."""

    def __init__(self, layout: Layout) -> None:
        self.zero = {site.name: 0.0 for site in layout.sites() if site.storage != "weight"}
        self.wanted = {site.name for site in layout.others if site.storage == "linear"}
        self.shape = (0, 0)
        self.norms: dict[str, Tensor] = {}
        self.used: set[str] = set()
        self.latest: tuple[Tensor, Rows] | None = None

    def begin(self, inputs: Inputs) -> None:
        """Reset for the next batch."""
        num_samples, positions = inputs["input_ids"].shape
        self.shape = (int(num_samples), int(positions))
        self.norms, self.used, self.latest = {}, set(), None

    def end(self) -> dict[str, float]:
        """Return the batch's norms, and check that every matrix was used."""
        unused = sorted(self.wanted - self.used)
        if unused:
            more = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
            raise ProfileError(
                f"the sensitivity of {unused[0]}{more} cannot be measured: the model did not call the layer.",
                fix="profile without sensitivity",
            )
        names = list(self.norms)
        device = self.norms[names[0]].device if names else None  # layers may be on several devices
        values = torch.stack([self.norms[name].to(device) for name in names]).double().tolist() if names else []
        return self.zero | dict(zip(names, values, strict=True))

    def by_sample(self, rows: Tensor, name: str) -> Tensor:
        """Reshape a layer's rows to (N, P, width)."""
        num_samples, positions = self.shape
        if rows.numel() // rows.shape[-1] == num_samples * positions or num_samples == 1:
            return rows.reshape(num_samples, -1, rows.shape[-1])
        raise ProfileError(
            f"{name} was given {rows.numel() // rows.shape[-1]} rows for {num_samples} x {positions} tokens, so "
            "its rows cannot be assigned to samples.",
            fix="profile with batches of one row",
        )

    def rows(self, x: Tensor, name: str) -> Rows:
        """Return a layer's input. Layers that are called with the same tensor share it."""
        if self.latest is None or self.latest[0] is not x:
            self.latest = (x, Rows(self.by_sample(x.detach(), name)))
        return self.latest[1]

    def note(self, name: str) -> None:
        """Record that a site was used. Two uses in one pass are an error: they would need cross terms."""
        if name in self.used:
            raise ProfileError(f"{name} is used more than once in a forward pass, so its gradient cannot be measured.")
        self.used.add(name)


@contextmanager
def _meter_hooks(model: nn.Module, layout: Layout, meter: _Meter) -> Iterator[None]:
    """Hook every linear site, and replace the forward of stacked experts."""
    modules = {path: (called, base) for path, called, base in walk_modules(model)}
    with ExitStack() as stack:
        for site in layout.sites():
            if site.storage == "linear":
                handle = modules[site.name][1].register_forward_hook(_linear_hook(meter, site))
                stack.callback(handle.remove)
        for block in layout.blocks:
            if block.storage == "fused":
                called, base = modules[block.name]
                stack.enter_context(_forward_replaced(called, _experts_forward(meter, block.name, called, base)))
        yield


def _linear_hook(meter: _Meter, site: Site) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    """Keep a linear layer's input until the gradient of its output arrives."""

    def after(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        meter.note(site.name)
        if args[0].numel() == 0 or not output.requires_grad:
            return
        inputs = [meter.rows(args[0], site.name)]

        def on_gradient(grad: Tensor) -> None:
            meter.norms[site.name] = inputs.pop().squared_norms(meter.by_sample(grad, site.name)).sum()

        output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    return after


def _experts_forward(meter: _Meter, path: str, called: nn.Module, base: Any) -> Callable[..., Tensor]:
    """Make a forward for stacked experts that keeps each product's input until its output's gradient arrives."""
    form = known_form(base)
    adapted = called if isinstance(called, AdaptedExperts) else None

    def forward(
        hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        meter.note(path)
        num_samples, positions = meter.shape
        copies = form.num_experts if top_k_index is None else 1
        tokens = hidden_states.numel() // hidden_states.shape[-1] // copies
        if num_samples > 1 and tokens != num_samples * positions:
            raise ProfileError(f"{path} was given {tokens} tokens.", fix="profile with batches of one row")
        samples_S = token_of_rows(base, hidden_states, top_k_index) // (tokens // num_samples)

        def product(parameter: str, x_SI: Tensor, ends_E: Tensor) -> Tensor:
            out_SO = base_product(base, form, parameter, x_SI, ends_E)
            inputs = [x_SI.detach()]

            def on_gradient(grad_SO: Tensor) -> None:
                grads = form.split(parameter, grad_SO)
                norms = expert_squared_norms(
                    inputs.pop(), tuple(grads.values()), samples_S, ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
                )
                for projection, by_expert in zip(grads, norms, strict=True):
                    for expert, norm in enumerate(by_expert):
                        meter.norms[f"{path}.{expert}.{projection}"] = norm

            if out_SO.requires_grad:
                out_SO.register_hook(on_gradient)  # type: ignore[no-untyped-call]
            if adapted is None:
                return out_SO
            return adapted.after_product(adapted.adapters_to_run(), parameter, x_SI, out_SO, ends_E)

        return run_experts(base, hidden_states, top_k_index, top_k_weights, product)

    return forward


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replace a module's forward inside the context, below accelerate's hooks if there are any."""
    name = forward_attribute(module)
    before = vars(module).get(name)
    setattr(module, name, forward)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


def rows_of(batch: Batch) -> Iterator[dict[str, Any]]:
    """Split a batch into batches of one row, without padding at the end and without unusable rows.

    Args:
        batch: A batch.

    Yields:
        Batches of shape (1, P). Rows without a token or a label are skipped, unless this applies to all rows.
    """
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    useful = [
        row
        for row in range(len(batch["input_ids"]))
        if (mask is None or mask[row].any()) and (labels is None or bool((labels[row, 1:] != IGNORED).any()))
    ]
    if not useful:
        yield dict(batch)
        return
    for row in useful:
        part = {name: value[row : row + 1] for name, value in batch.items() if isinstance(value, Tensor)}
        length = int(part["attention_mask"].nonzero()[-1, 1]) + 1 if "attention_mask" in part else None
        yield {name: value[:, :length] for name, value in part.items()}
