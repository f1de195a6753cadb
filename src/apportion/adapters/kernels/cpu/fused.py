"""A layer's experts with low-rank terms as one step of autograd: what a CPU runs fastest.

A few experts at a time run from their tokens to their outputs while their rows lie in the cache. For the backward pass
only the products that enter the activation are saved, and what is cheap is computed again. Composed of small
operations, the same work moves every row through memory a dozen times and keeps most of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from apportion.adapters.kernels.cpu.activation import activate_again
from apportion.adapters.kernels.cpu.chunk_products import BackwardPass, ForwardPass
from apportion.adapters.kernels.cpu.routed import RoutedExperts
from apportion.adapters.kernels.cpu.saved import Gradients, SavedProducts, TermFactors, TermNeeds, by_term
from apportion.adapters.kernels.cpu.sorted_rows import SortedRows

# Shapes: T tokens, K experts per token, M sorted rows with those that fill the experts' rooms, C rows of a chunk,
# n rows of an expert, D model width, F expert width, I and O a parameter's input and output width.


def fused_experts(routed: RoutedExperts, hidden_TD: Tensor, weights_TK: Tensor) -> Tensor:
    """Run a layer's experts with their low-rank terms.

    Args:
        routed: The experts, their tokens and their terms.
        hidden_TD: Tokens, in the type of the experts' parameters.
        weights_TK: Routing weights.

    Returns:
        Shape (T, D).

    Cost: the products of the routed rows with the experts' matrices, and 2 n r (I + O) operations for a term of rank r
        on n rows; the backward pass keeps, of every row, what enters the activation and r numbers per term.
    """
    factors = [TermFactors.of(term) for term in itertools.chain.from_iterable(routed.terms.values())]
    inputs = (hidden_TD, weights_TK, *itertools.chain.from_iterable(factors))
    if not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _forward(SortedRows(routed), hidden_TD, weights_TK, factors, None)
    out_TD: Tensor = _FusedExperts.apply(routed, *inputs)  # type: ignore[no-untyped-call]
    return out_TD


class _FusedExperts(torch.autograd.Function):
    """The experts and their backward pass; the terms' factors come one after the other, as `by_term` reads them."""

    @staticmethod
    def forward(ctx: Any, routed: RoutedExperts, hidden_TD: Tensor, weights_TK: Tensor, *flat_factors: Any) -> Tensor:
        """Run the experts, and save what the backward pass cannot cheaply compute again."""
        rows = SortedRows(routed)
        saved = SavedProducts.room_for(rows, hidden_TD)
        out_TD = _forward(rows, hidden_TD, weights_TK, by_term(TermFactors, flat_factors), saved)
        ctx.rows, ctx.num_factors, ctx.code_keys = rows, len(flat_factors), list(saved.codes)
        ctx.save_for_backward(hidden_TD, weights_TK, *flat_factors, *saved.tensors(), *rows.plain_matrices())
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
        """Return the gradients of tokens, weights and factors."""
        rows: SortedRows = ctx.rows
        hidden_TD, weights_TK, *rest = ctx.saved_tensors  # raises where one was changed since
        factors = by_term(TermFactors, rest[: ctx.num_factors])
        saved = SavedProducts.of(rows, rest[ctx.num_factors :], ctx.code_keys)
        _, needs_hidden, _, *flat_needs = ctx.needs_input_grad
        needs = by_term(TermNeeds, flat_needs)
        gradients = Gradients.room_for(rows, hidden_TD, factors, needs, needs_hidden=needs_hidden)
        weights_M1 = rows.by_row(weights_TK).unsqueeze(1)
        with torch.autocast("cpu", enabled=False):  # if backward() is called under autocast
            _backward(BackwardPass(rows, factors, saved, gradients), hidden_TD, weights_M1, grad_TD.contiguous())
        flat_grads = itertools.chain.from_iterable(gradients.of_terms(rows, factors))
        return None, gradients.of_hidden(rows), gradients.of_weights(rows, weights_TK), *flat_grads


def _forward(
    rows: SortedRows,
    hidden_TD: Tensor,
    weights_TK: Tensor,
    factors: Sequence[TermFactors],
    saved: SavedProducts | None,
) -> Tensor:
    """Run the experts, and fill in what is saved.

    Args:
        rows: The rows and their experts.
        hidden_TD: Tokens.
        weights_TK: Routing weights.
        factors: Every term's factors.
        saved: What the backward pass needs; None where there is none.

    Returns:
        Shape (T, D).
    """
    down = rows.form.parameters[-1]
    out_MD = hidden_TD.new_empty(rows.room, rows.matrices[down].width_out)
    forward = ForwardPass(rows, factors, saved)
    for chunk in rows.chunks:
        x_CD = hidden_TD.index_select(0, rows.tokens[chunk.window])
        if saved is None:
            entered = {name: x_CD.new_empty(len(x_CD), rows.matrices[name].width_out) for name in rows.form.entering}
        else:
            entered = {name: whole_MO[chunk.window] for name, whole_MO in saved.entered.items()}
        for name, out_CO in entered.items():
            forward.multiply(name, x_CD, chunk, out_CO)
        activated_CF = rows.form.activate(rows.routed.module, entered)
        forward.multiply(down, activated_CF, chunk, out_MD[chunk.window])
    return rows.sum_over_experts(out_MD, weights_TK)


def _backward(backward: BackwardPass, hidden_TD: Tensor, weights_M1: Tensor, grad_TD: Tensor) -> None:
    """Fill in the gradients.

    Args:
        backward: The pass, with the gradients that are to be filled in.
        hidden_TD: The tokens.
        weights_M1: The routing weights, row by row.
        grad_TD: Gradient of the output.
    """
    rows, gradients = backward.rows, backward.gradients
    down = rows.form.parameters[-1]
    for chunk in rows.chunks:
        tokens_C = rows.tokens[chunk.window]
        grad_CD, weights_C1 = grad_TD.index_select(0, tokens_C), weights_M1[chunk.window]
        entered = {name: whole_MO[chunk.window] for name, whole_MO in backward.entered.items()}
        activated_CF, back = activate_again(rows, entered)
        grad_CF = torch.empty_like(activated_CF)
        backward.multiply(down, grad_CD, activated_CF, chunk, grad_CF, weights_C1=weights_C1)
        # <y, g> of a row, which its weight's gradient is, equals <h, W g>: the outputs need not be saved
        grad_weights_C = gradients.weights_M[chunk.window]
        torch.linalg.vecdot(activated_CF, grad_CF, out=grad_weights_C)
        bias_ED = rows.biases[down]
        if bias_ED is not None:
            columns = zip(chunk.experts, chunk.cut(grad_CD), chunk.cut(grad_weights_C), strict=True)
            for expert, grad_nD, grad_weights_n in columns:
                grad_weights_n.add_(grad_nD @ bias_ED[expert])
        grads_entered = back(grad_CF.mul_(weights_C1))
        has_terms = any(backward.terms(name, chunk) for name in entered)
        x_CD = hidden_TD.index_select(0, tokens_C) if has_terms else None
        grad_x_CD = None if gradients.hidden_MD is None else gradients.hidden_MD[chunk.window]
        for number, (name, grad_CO) in enumerate(zip(entered, grads_entered, strict=True)):
            backward.multiply(name, grad_CO, x_CD, chunk, grad_x_CD, add=number > 0)
