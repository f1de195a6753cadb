"""Low-rank terms on sorted rows, composed of PyTorch's operations: any device, any compiler."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from apportion.adapters.constants import constant
from apportion.adapters.factors import matrix_of
from apportion.adapters.kernels.terms import LowRankTerm, join_terms
from apportion.experts.forms import ExpertForm
from apportion.experts.grouped import grouped_low_rank, inverse_order, reorder_rows
from apportion.experts.run import expert_of_rows

# Shapes: S routed rows sorted by expert, E experts, H planned experts, I and O a parameter's input and output width,
# R summed rank of the planned experts, r rank per expert.

_RANK_BLOCK = 8  # PyTorch's grouped product wants ranks that are multiples of it


def add_terms(
    form: ExpertForm,
    parameter: str,
    terms: Mapping[str, LowRankTerm],
    x_SI: Tensor,
    out_SO: Tensor,
    ends_E: Tensor,
) -> Tensor:
    """Add low-rank terms to the output of one stacked parameter.

    Args:
        form: The form of the experts.
        parameter: The parameter's path.
        terms: The terms by projection, at least one.
        x_SI: The terms' input, rows sorted by expert.
        out_SO: The parameter's output.
        ends_E: Where each expert's rows end, int32.

    Returns:
        Shape (S, O).
    """
    rounded = [term.to(x_SI.dtype) for term in terms.values()]
    joined = join_terms(rounded)
    if len(joined) < len(rounded):
        return out_SO + _low_rank(joined[0], x_SI, ends_E).to(out_SO.dtype)
    parts = form.split(parameter, out_SO)
    for name, term in zip(terms, joined, strict=True):
        parts[name] = parts[name] + _low_rank(term, x_SI, ends_E).to(out_SO.dtype)
    return form.join(parameter, parts)


def _low_rank(term: LowRankTerm, x_SI: Tensor, ends_E: Tensor) -> Tensor:
    """Return what a term adds to sorted rows; nothing here waits for a GPU.

    The rows of the planned experts come first, in their order, and the products stop behind them.
    """
    planned, b_RO = term.planned, matrix_of(term.b_RO).to(x_SI.dtype)
    a_HrI = planned.padded(term.a_RI * planned.scale(term.a_RI), _RANK_BLOCK)
    b_HrO = planned.padded(b_RO, _RANK_BLOCK)
    if len(planned.experts) == len(ends_E):
        return grouped_low_rank(x_SI, a_HrI, b_HrO, ends_E)
    planned_H = constant(planned.experts, x_SI.device)
    is_planned_E = torch.zeros_like(ends_E, dtype=torch.bool).index_fill(0, planned_H, value=True)
    is_unplanned_S = ~is_planned_E[expert_of_rows(x_SI, ends_E)]
    order_S = is_unplanned_S.to(torch.uint8).sort(stable=True).indices
    place_S = inverse_order(order_S)
    ends_H = ends_E.diff(prepend=ends_E.new_zeros(1))[planned_H].cumsum(0).to(torch.int32)
    is_behind_S1 = (torch.arange(len(order_S), device=order_S.device) >= ends_H[-1]).unsqueeze(1)
    planned_first_SI = reorder_rows(x_SI, order_S, place_S).masked_fill(is_behind_S1, 0)
    delta_SO = grouped_low_rank(planned_first_SI, a_HrI, b_HrO, ends_H).masked_fill(is_behind_S1, 0)
    return reorder_rows(delta_SO, place_S, order_S)
