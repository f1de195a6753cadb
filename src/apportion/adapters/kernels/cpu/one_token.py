"""A layer's experts with low-rank terms for a single token, as decoding runs them: nothing to sort, nothing to save."""

from __future__ import annotations

from torch import Tensor

from apportion.adapters.factors import matrix_of
from apportion.adapters.kernels.cpu.product import multiply
from apportion.adapters.kernels.cpu.routed import RoutedExperts

# Shapes: K experts of the token, E experts, D model width, I and O a parameter's input and output width, R summed rank
# of a term, r rank of one expert.


def run_one_token(routed: RoutedExperts, hidden_1D: Tensor, weights_1K: Tensor) -> Tensor:
    """Run a token's experts with their low-rank terms, without gradients.

    Args:
        routed: The experts, the token's ids and the terms, without dropout.
        hidden_1D: The token, in the type of the experts' parameters.
        weights_1K: Routing weights.

    Returns:
        Shape (1, D).
    """
    form, ids = routed.form, routed.ids_TK[0].tolist()
    *entering, down = routed.matrices
    entered = {name: _product(routed, name, ids, hidden_1D.repeat(len(ids), 1)) for name in entering}
    out_KD = _product(routed, down, ids, form.activate(routed.module, entered))
    return (weights_1K @ out_KD.to(weights_1K.dtype)).to(hidden_1D.dtype)


def _product(routed: RoutedExperts, parameter: str, ids: list[int], x_KI: Tensor) -> Tensor:
    """Multiply each expert's row by one parameter, with its bias and its terms; shape (K, O)."""
    matrices = routed.matrices[parameter]
    expert_matrix = matrices.by_expert(len(ids), turned=True)
    bias_EO = routed.form.bias(routed.module, parameter)
    out_KO = x_KI.new_empty(len(ids), matrices.width_out)
    for expert, x_1I, out_1O in zip(ids, x_KI.unsqueeze(1).unbind(), out_KO.unsqueeze(1).unbind(), strict=True):
        multiply(x_1I, expert_matrix(expert), out_1O, None if bias_EO is None else bias_EO[expert])
    for term in routed.terms[parameter]:
        a_RI, b_RO, rows_of_experts = term.a_RI, matrix_of(term.b_RO), term.planned.rows_of_experts
        for slot, expert in enumerate(ids):
            if expert in rows_of_experts:
                rows, scale = rows_of_experts[expert]
                code_r = a_RI[rows].mv(x_KI[slot].to(a_RI.dtype))
                out_KO[slot, term.columns].add_(code_r @ b_RO[rows], alpha=scale)
    return out_KO
