"""A layer's experts with low-rank terms as one step of autograd: what a CPU runs fastest.

A few experts at a time run from their tokens to their outputs while their rows lie in the cache. For the backward pass
only the products that enter the activation are kept, and what is cheap is computed again. Composed of small operations,
the same work moves every row through memory a dozen times and keeps most of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from apportion.adapters.expert_products import Backward, Forward, Gradients, Kept
from apportion.adapters.factors import SparseFactor
from apportion.adapters.routed_rows import RoutedExperts, SortedRows

_Back = Callable[[Tensor], Sequence[Tensor]]  # from the gradient of the activated to those of what entered

# Shapes: T tokens, K experts a token, S = T·K rows sorted by expert, n rows of a term's experts, D model width,
# I and O a parameter's input and output width.


def fused_experts(routed: RoutedExperts, hidden_TD: Tensor, weights_TK: Tensor) -> Tensor:
    """Run a layer's experts with their low-rank terms.

    Args:
        routed: The experts, their tokens and their terms.
        hidden_TD: Tokens, in the type of the experts' parameters.
        weights_TK: Routing weights.

    Returns:
        Shape (T, D).

    Cost: the products of the routed rows with the experts' matrices, and 2 n r (I + O) operations for a term of rank r
        on n rows; the backward pass keeps, of every row, what enters the activation and r numbers a term.
    """
    factors: list[Tensor | None] = []
    for term in itertools.chain.from_iterable(routed.terms.values()):
        a, b = term.a_RI, term.b_RO
        factors += [a, b.values.to(a.dtype), b.indices] if isinstance(b, SparseFactor) else [a, b, None]
    inputs = (hidden_TD, weights_TK, *factors)
    if not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _forward(SortedRows(routed), hidden_TD, weights_TK, factors, None)
    out: Tensor = _FusedExperts.apply(routed, *inputs)  # type: ignore[no-untyped-call]
    return out


class _FusedExperts(torch.autograd.Function):
    """The experts and their backward pass."""

    @staticmethod
    def forward(ctx: Any, routed: RoutedExperts, hidden: Tensor, weights: Tensor, *factors: Any) -> Tensor:
        """Run the experts, and keep what the backward pass cannot cheaply compute again."""
        run = SortedRows(routed)
        kept = Kept.room_for(run, hidden)
        out = _forward(run, hidden, weights, factors, kept)
        ctx.run, ctx.num_factors, ctx.codes = run, len(factors), list(kept.codes)
        ctx.save_for_backward(hidden, weights, *factors, *kept.tensors(), *run.matrices.values())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Give the gradients of tokens, weights and factors."""
        hidden, weights, *rest = ctx.saved_tensors  # raises where one was changed since
        factors, kept = rest[: ctx.num_factors], Kept.of(ctx.run, rest[ctx.num_factors :], ctx.codes)
        needs_hidden, _, *needs_factors = ctx.needs_input_grad[1:]
        grads = Gradients.room_for(ctx.run, hidden, factors, needs_factors, needs_hidden=needs_hidden)
        _backward(ctx.run, grad.contiguous(), hidden, weights, factors, kept, grads)
        return None, *grads.of_inputs(ctx.run, weights, factors)


def _forward(run: SortedRows, hidden: Tensor, weights: Tensor, factors: Sequence[Any], kept: Kept | None) -> Tensor:
    """Run the experts, and fill in what is kept.

    Args:
        run: The rows and their experts.
        hidden: Shape (T, D).
        weights: Shape (T, K).
        factors: A, B or its values, and its indices of every term.
        kept: What the backward pass needs; None where there is none.

    Returns:
        Shape (T, D).
    """
    down = run.form.parameters[-1]
    out_SD = hidden.new_empty(run.room, run.matrices[down].shape[1])
    forward = Forward(run, factors, kept)
    for chunk in run.chunks:
        x = hidden.index_select(0, run.tokens[chunk.window])
        if kept is None:
            entered = {name: x.new_empty(len(x), run.matrices[name].shape[1]) for name in run.form.entering}
        else:
            entered = {name: whole[chunk.window] for name, whole in kept.entered.items()}
        for name, out in entered.items():
            forward.multiply(name, x, chunk, out)
        h = run.form.activate(run.routed.module, entered)
        forward.multiply(down, h, chunk, out_SD[chunk.window])
    return run.sum_over_experts(out_SD, weights)


def _backward(
    run: SortedRows,
    grad: Tensor,
    hidden: Tensor,
    weights: Tensor,
    factors: Sequence[Any],
    kept: Kept,
    grads: Gradients,
) -> None:
    """Fill in the gradients.

    Args:
        run: The rows and their experts.
        grad: Of the output, shape (T, D).
        hidden: The tokens.
        weights: The routing weights.
        factors: As in the forward pass.
        kept: What the forward pass kept.
        grads: What is to be filled in.
    """
    down = run.form.parameters[-1]
    backward = Backward(run, factors, kept, grads)
    rows_w = run.by_row(weights)
    for chunk in run.chunks:
        tokens = run.tokens[chunk.window]
        g, w = grad.index_select(0, tokens), rows_w[chunk.window].unsqueeze(1)
        entered = {name: whole[chunk.window] for name, whole in kept.entered.items()}
        h, back = _swiglu(entered) if run.form.is_swiglu else _activation(run, entered)
        grad_h = torch.empty_like(h)
        backward.multiply(down, g, h, chunk, grad_h, weights=w)
        # <y, g> of a row, which its weight's gradient is, equals <h, W g>: the outputs need not be kept
        torch.linalg.vecdot(h, grad_h, out=grads.weights[chunk.window])
        if run.form.has_bias:
            bias = getattr(run.routed.module, f"{down}_bias")
            own = zip(chunk.experts, chunk.cut(g), chunk.cut(grads.weights[chunk.window]), strict=True)
            for expert, rows, found in own:
                found.add_(rows @ bias[expert])
        inner = back(grad_h.mul_(w))
        x = hidden.index_select(0, tokens) if any(backward.terms(name, chunk) for name in entered) else None
        target = None if grads.rows is None else grads.rows[chunk.window]
        for number, (name, own_grad) in enumerate(zip(entered, inner, strict=True)):
            backward.multiply(name, own_grad, x, chunk, target, add=number > 0)


def _activation(run: SortedRows, entered: Mapping[str, Tensor]) -> tuple[Tensor, _Back]:
    """Activate again, and give the way back."""
    with torch.enable_grad():
        leaves = {name: product.detach().requires_grad_() for name, product in entered.items()}
        activated = run.form.activate(run.routed.module, leaves)
    return activated.detach(), lambda grad: torch.autograd.grad(activated, list(leaves.values()), grad)


def _swiglu(entered: Mapping[str, Tensor]) -> tuple[Tensor, _Back]:
    """Do what `_activation` does, without autograd's copies, for the form that most models have."""
    (product,) = entered.values()
    gate, up = product.chunk(2, dim=1)
    opened = functional.silu(gate)

    def back(grad: Tensor) -> Sequence[Tensor]:
        """Give the product's gradient; the one that is given is used up."""
        grad_product = torch.empty_like(product)
        grad_gate, grad_up = grad_product.chunk(2, dim=1)
        torch.mul(grad, opened, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
        return (grad_product,)

    return opened * up, back
