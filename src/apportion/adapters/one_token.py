"""A layer's experts with low-rank terms for a single token, as decoding runs them: nothing to sort, nothing to keep."""

from __future__ import annotations

from torch import Tensor

from apportion.adapters.cpu_product import multiply
from apportion.adapters.factors import matrix_of
from apportion.adapters.routed_rows import RoutedExperts

# Shapes: K experts of the token, D model width, I and O a parameter's input and output width, R summed rank of a term,
# r rank of one expert.


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
    entered = {name: _product(routed, name, ids, hidden_1D.repeat(len(ids), 1)) for name in form.entering}
    out_KD = _product(routed, form.parameters[-1], ids, form.activate(routed.module, entered))
    return (weights_1K @ out_KD.to(weights_1K.dtype)).to(hidden_1D.dtype)


def _product(routed: RoutedExperts, name: str, ids: list[int], x_KI: Tensor) -> Tensor:
    """Multiply each expert's row by one parameter, with its bias and its terms; shape (K, O)."""
    matrices, transposed = routed.form.matrices(routed.module, name)
    matrices_EIO = matrices if transposed else matrices.transpose(1, 2)
    biases = getattr(routed.module, f"{name}_bias") if routed.form.has_bias else None
    out_KO = x_KI.new_empty(len(ids), matrices_EIO.shape[2])
    for expert, row, out in zip(ids, x_KI.unsqueeze(1).unbind(), out_KO.unsqueeze(1).unbind(), strict=True):
        multiply(row, matrices_EIO[expert], out, None if biases is None else biases[expert])
    for term in routed.terms[name]:
        a_RI, b_RO, places = term.a_RI, matrix_of(term.b_RO), term.planned.places
        for slot, expert in enumerate(ids):
            if expert in places:
                place, scale = places[expert]
                code_r = a_RI[place].mv(x_KI[slot].to(a_RI.dtype))
                out_KO[slot, term.columns].add_(code_r @ b_RO[place], alpha=scale)
    return out_KO
