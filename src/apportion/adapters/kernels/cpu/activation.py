"""The activation of a chunk's rows again in the backward pass, and the way back through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from apportion.adapters.kernels.cpu.sorted_rows import SortedRows

# Shapes: C rows of a chunk, F expert width.

Back = Callable[[Tensor], Sequence[Tensor]]  # from the gradient of the activated to those of what entered


def activate_again(rows: SortedRows, entered: Mapping[str, Tensor]) -> tuple[Tensor, Back]:
    """Activate rows again.

    Args:
        rows: The rows and their experts.
        entered: What enters the activation, by parameter.

    Returns:
        The activated rows, shape (C, F), and the way back; the gradient that this takes is used up.
    """
    if rows.form.is_swiglu:
        return _swiglu(entered)
    with torch.enable_grad():
        leaves = {name: product.detach().requires_grad_() for name, product in entered.items()}
        activated_CF = rows.form.activate(rows.routed.module, leaves)
    return activated_CF.detach(), lambda grad_CF: torch.autograd.grad(activated_CF, list(leaves.values()), grad_CF)


def _swiglu(entered: Mapping[str, Tensor]) -> tuple[Tensor, Back]:
    """Do it without autograd's copies, for the form that most models have."""
    (product_C2F,) = entered.values()
    gate_CF, up_CF = product_C2F.chunk(2, dim=1)
    opened_CF = functional.silu(gate_CF)

    def back(grad_CF: Tensor) -> Sequence[Tensor]:
        """Return the product's gradient."""
        grad_product_C2F = torch.empty_like(product_C2F)
        grad_gate_CF, grad_up_CF = grad_product_C2F.chunk(2, dim=1)
        torch.mul(grad_CF, opened_CF, out=grad_up_CF)
        torch.ops.aten.silu_backward.grad_input(grad_CF.mul_(up_CF), gate_CF, grad_input=grad_gate_CF)
        return (grad_product_C2F,)

    return opened_CF * up_CF, back
