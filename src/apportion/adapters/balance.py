"""The balance loss of one layer with routed LoRA experts."""

from __future__ import annotations

import torch
from torch import Tensor

# Shapes: T tokens (over any leading dimensions), E LoRA experts, K of them used per token.


class BalanceSums:
    """The balance loss of one routed layer over one forward pass.

    Switch form: E Σ_i f_i P_i with f the share of the routed slots that expert i takes and P its mean probability, over
    real tokens alone; 1 where all experts take the same share.
    """

    def __init__(self) -> None:
        self.real_T: Tensor | None = None
        self.loss: Tensor | None = None

    def add(self, probabilities_TE: Tensor, ids_TK: Tensor) -> None:
        """Take one forward pass.

        Args:
            probabilities_TE: Of every expert, shape (..., E).
            ids_TK: Of the experts used, shape (..., K).
        """
        num_experts = probabilities_TE.shape[-1]
        probabilities_TE, ids_TK = probabilities_TE.reshape(-1, num_experts), ids_TK.reshape(-1, ids_TK.shape[-1])
        real_T = probabilities_TE.new_ones(len(ids_TK))
        if self.real_T is not None and len(self.real_T) == len(ids_TK):
            real_T = self.real_T.to(probabilities_TE)
        num_real = real_T.sum().clamp(min=1)
        slots_TE = torch.zeros_like(probabilities_TE).scatter(1, ids_TK, 1.0)  # no wait for the device
        share_E = (slots_TE * real_T[:, None]).sum(0) / (num_real * ids_TK.shape[-1])
        mean_E = (probabilities_TE * real_T[:, None]).sum(0) / num_real
        self.loss = num_experts * (share_E * mean_E).sum()
