"""Run stacked experts on the routed rows, sorted by expert, with products that the caller chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from apportion.experts.dequantising import dequantised_linear
from apportion.experts.forms import ExpertForm, known_form
from apportion.experts.grouped import grouped_linear, inverse_order, reorder_rows

# Shapes: T tokens, N = T or, where a module is called with one copy of the tokens per expert, E·T rows, K experts per
# token, S = T·K routed rows sorted by expert, E experts, D model width, I and O a parameter's input and output width.

Product = Callable[[str, Tensor, Tensor], Tensor]


@runtime_checkable
class AdaptedExperts(Protocol):
    """A module that wraps stacked experts and adds adapters to the output of each stacked parameter."""

    def adapters_to_run(self) -> list[str]:
        """Return the names of the adapters that the forward pass adds."""

    def after_product(
        self, active: Sequence[str], parameter: str, x_SI: Tensor, out_SO: Tensor, ends_E: Tensor
    ) -> Tensor:
        """Add adapters to the output of one stacked parameter."""


def run_experts(
    base: nn.Module, hidden_ND: Tensor, ids_TK: Tensor | None, weights_TK: Tensor | None, product: Product
) -> Tensor:
    """Run stacked experts on the routed rows, sorted by expert.

    Args:
        base: A module that `form_of` knows.
        hidden_ND: Shape (T, D); or (E·T, D), one copy of the tokens per expert, where the module is called so.
        ids_TK: Expert ids, shape (T, K); None where the module is called with copies.
        weights_TK: Routing weights, shape (T, K); None where the module is called with copies.
        product: Called with each stacked parameter's path, its input rows and where each expert's rows end, int32;
            returns the output rows, as `base_product` does.

    Returns:
        The shape of `hidden_ND`.
    """
    form = known_form(base)
    rows_ND = hidden_ND.reshape(-1, hidden_ND.shape[-1])
    if ids_TK is None or weights_TK is None:
        routed_N = rows_ND.any(dim=1)  # the rows of tokens that are not routed to an expert are zero, and stay so
        ends_E = routed_N.view(form.num_experts, -1).sum(1).cumsum(0).to(torch.int32)
        rows_S = routed_N.nonzero().squeeze(1)
        out_SD = _run_sorted(base, form, rows_ND.index_select(0, rows_S), ends_E, product)
        summed_ND = torch.zeros_like(rows_ND).index_copy(0, rows_S, out_SD.to(rows_ND.dtype))
    else:
        num_tokens, top_k = ids_TK.shape
        ids_S, order_S = ids_TK.reshape(-1).sort(stable=True)
        experts_E = torch.arange(form.num_experts, device=ids_S.device)
        ends_E = torch.searchsorted(ids_S, experts_E, right=True, out_int32=True)
        place_S = inverse_order(order_S)
        x_SD = reorder_rows(rows_ND, order_S, place_S, copies=top_k)
        out_SD = _run_sorted(base, form, x_SD, ends_E, product)
        out_SD = reorder_rows(out_SD, place_S, order_S) * weights_TK.reshape(-1, 1)
        summed_ND = out_SD.view(num_tokens, top_k, -1).sum(1)
    return summed_ND.to(hidden_ND.dtype).view_as(hidden_ND)


def token_of_rows(base: nn.Module, hidden_ND: Tensor, ids_TK: Tensor | None) -> Tensor:
    """Return which token each of the rows is that `run_experts` sorts by expert.

    Args:
        base: As `run_experts` takes it.
        hidden_ND: As `run_experts` takes it.
        ids_TK: As `run_experts` takes it.

    Returns:
        Positions among the T tokens, shape (S,).
    """
    if ids_TK is None:
        rows_ND = hidden_ND.reshape(-1, hidden_ND.shape[-1])
        return rows_ND.any(dim=1).nonzero().squeeze(1) % (len(rows_ND) // known_form(base).num_experts)
    return ids_TK.reshape(-1).sort(stable=True).indices // ids_TK.shape[1]


def base_product(base: nn.Module, form: ExpertForm, parameter: str, x_SI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply sorted rows by one stacked parameter, bias included.

    Args:
        base: A module of stacked experts.
        form: Its form.
        parameter: The parameter's path.
        x_SI: Rows sorted by expert.
        ends_E: Where each expert's rows end, int32.

    Returns:
        Shape (S, O), in the parameter's type.
    """
    weight, transposed = form.matrices(base, parameter)
    out_SO: Tensor
    if weight.is_packed:
        out_SO = dequantised_linear(x_SI, weight, ends_E, transposed=transposed)
    else:
        out_SO = grouped_linear(x_SI, weight.whole(), ends_E, transposed=transposed)
    bias_EO = form.bias(base, parameter)
    return out_SO if bias_EO is None else out_SO + bias_EO[expert_of_rows(x_SI, ends_E)]


def expert_of_rows(x_SI: Tensor, ends_E: Tensor) -> Tensor:
    """Return the expert of every sorted row, shape (S,)."""
    return torch.searchsorted(ends_E, torch.arange(len(x_SI), device=x_SI.device, dtype=torch.int32), right=True)


def _run_sorted(base: Any, form: ExpertForm, x_SD: Tensor, ends_E: Tensor, product: Product) -> Tensor:
    """Run stacked experts on rows that are sorted by expert."""
    entered = {parameter: product(parameter, x_SD, ends_E) for parameter in form.entering}
    out_SD = product(form.parameters[-1], form.activate(base, entered), ends_E)
    normed_SD: Tensor = getattr(base, form.norm)(out_SD) if form.norm else out_SD
    return normed_SD
