"""The shape `routed`: several LoRA experts, and a linear router that weights them per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apportion.adapters.balance import BalanceSums
from apportion.adapters.factors import DenseFactor
from apportion.adapters.shapes.base import Draw, LoraPair, Place, SiteFactors
from apportion.adapters.shapes.low_rank import LowRank

# Shapes: T tokens (over any leading dimensions), E LoRA experts, K of them used per token, R rank of each, N = E·R,
# I and O input and output width.


class Routed(LowRank):
    """A gated sum of low-rank experts: ``scale · Σ_{i in top-k} g_i(x) B_i A_i x``.

    The gates g are the softmax of a linear router over the experts, its top-k renormalised. The sum equals one LoRA of
    rank E·R whose rank blocks are scaled by the gates, so two dense products serve any number of experts; nothing of
    the size tokens x experts x width is ever made.

    Args:
        factors: A, which maps the input to the rank of all experts, and B.
        place: The matrix.
        num_experts: LoRA experts.
        top_k: LoRA experts used per token.
        scale: alpha / rank of each.
    """

    is_gated: ClassVar[bool] = True
    lora_router: Any

    def __init__(
        self, factors: tuple[nn.Module, nn.Module], place: Place, num_experts: int, top_k: int, scale: float
    ) -> None:
        super().__init__(*factors, scale)
        self.lora_router = DenseFactor((num_experts, place.in_features), place.device, place.dtype)
        self.top_k = top_k
        self.balance: BalanceSums | None = None

    def as_lora(self) -> LoraPair | None:
        """Return None: gates depend on the input."""
        return None

    def factors(self) -> Iterator[SiteFactors]:
        """Return the factors of all experts."""
        yield SiteFactors("", self.lora_A.weight.detach(), self.lora_B.weight.detach())

    def forward(self, x_TI: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the gated sum.

        Args:
            x_TI: The layer's input, from which the router computes the gates.
            drop: Dropout of the experts' input.

        Returns:
            Shape (..., O), in the type of the factors.

        Cost: 2 E R (I + O) + 2 E I operations per token.
        """
        x_TI = x_TI.to(self.dtype)
        return self._gated(drop(x_TI), x_TI)

    def delta(self, x_TI: Tensor) -> Tensor:
        """Return the gated sum without dropout."""
        return self._gated(x_TI, x_TI)

    def start(self, draw: Draw) -> None:
        """Draw A and the router."""
        draw(self.lora_A.weight)
        draw(self.lora_router.weight, ".lora_router")

    def _gated(self, x_TI: Tensor, routed_TI: Tensor) -> Tensor:
        """Add up the experts' outputs for one input, with the gates for another."""
        code_TN = self.lora_A(x_TI)
        gates_TE = self._gates(routed_TI).to(code_TN.dtype) * self.scale
        code_TN = (code_TN.unflatten(-1, (gates_TE.shape[-1], -1)) * gates_TE.unsqueeze(-1)).flatten(-2)
        delta_TO: Tensor = self.lora_B(code_TN)
        return delta_TO

    def _gates(self, x_TI: Tensor) -> Tensor:
        """Return every expert's weight, zero outside the top-k; shape (..., E), at least float32."""
        logits_TE = self.lora_router(x_TI)
        probabilities_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).softmax(-1)
        top = probabilities_TE.topk(self.top_k, dim=-1)
        weights_TK = top.values / top.values.sum(-1, keepdim=True)
        if self.training and self.balance is not None:
            self.balance.add(probabilities_TE, top.indices)
        return torch.zeros_like(probabilities_TE).scatter(-1, top.indices, weights_TK)
