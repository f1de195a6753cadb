"""Run a layer's experts with their low-rank terms on a CPU, by the kernel that is fastest for the rows."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch
from torch import Tensor

from apportion.adapters.kernels.cpu.fused import fused_experts
from apportion.adapters.kernels.cpu.one_token import run_one_token
from apportion.adapters.kernels.cpu.routed import RoutedExperts
from apportion.adapters.kernels.terms import join_terms

# Shapes: T tokens, K experts per token, D model width.

_FEW_ROWS = 128  # up to here, rounding and joining factors costs more than it saves


def run_on_cpu(routed: RoutedExperts, hidden_TD: Tensor, weights_TK: Tensor) -> Tensor:
    """Run a layer's experts with their low-rank terms, in the type of the experts' parameters.

    Args:
        routed: The experts, their tokens and their terms.
        hidden_TD: Tokens, shape (..., D).
        weights_TK: Routing weights.

    Returns:
        The shape and the type of `hidden_TD`.
    """
    dtype = routed.dtype
    if torch.is_grad_enabled() or routed.ids_TK.numel() > _FEW_ROWS:
        rounded = {name: [term.to(dtype) for term in terms] for name, terms in routed.terms.items()}
        routed = replace(routed, terms={name: join_terms(terms) for name, terms in rounded.items()})
    rows_TD = hidden_TD.reshape(-1, hidden_TD.shape[-1])
    is_one_token = len(rows_TD) == 1 and not routed.dropout and not torch.is_grad_enabled()
    run = run_one_token if is_one_token else fused_experts
    autocast = torch.is_autocast_enabled("cpu")  # the backward pass has none either
    with torch.autocast("cpu", enabled=False) if autocast else contextlib.nullcontext():
        out_TD = run(routed, rows_TD.to(dtype), weights_TK)
    return out_TD.to(hidden_TD.dtype).view_as(hidden_TD)
