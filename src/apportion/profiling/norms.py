"""Squared Frobenius norms of weight gradients, from a layer's inputs and output gradients.

For a layer y = W x over a sample's rows X (P, I) with output gradients G (P, O), the weight's gradient is Gᵀ X, and
‖Gᵀ X‖² = Σ (X Xᵀ ∘ G Gᵀ). The right side costs P² (I + O) multiply-adds and P² numbers of memory. The left side costs
P I O multiply-adds and, computed in tiles, as much memory as X. The side with fewer multiply-adds is computed; the
I x O gradient is never stored as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Shapes: N samples, P positions, S rows sorted by expert, E experts, I and O input and output width.


class Rows:
    """A matrix's input by sample. Its Gram matrices are computed once for all matrices that share the input.

    Args:
        x_NPI: The input, shape (N, P, I).
    """

    def __init__(self, x_NPI: Tensor) -> None:
        self.x_NPI = x_NPI
        self._gram_NPP: Tensor | None = None

    def squared_norms(self, grad_NPO: Tensor) -> Tensor:
        """Return each sample's squared gradient norm.

        Args:
            grad_NPO: The output's gradient, shape (N, P, O).

        Returns:
            Float32, shape (N,).
        """
        grad, x = grad_NPO.float(), self.x_NPI.float()
        positions, width_in, width_out = *x.shape[1:], grad.shape[2]
        if gram_is_cheaper(positions, width_in, width_out):
            if self._gram_NPP is None:
                self._gram_NPP = x @ x.mT
            return (self._gram_NPP * (grad @ grad.mT)).sum((1, 2))
        tiles = torch.split(grad.mT, max(positions, 1), dim=1)
        return torch.stack([(tile @ x).square().sum((1, 2)) for tile in tiles]).sum(0)


def expert_squared_norms(
    x_SI: Tensor, grads_SO: Sequence[Tensor], samples_S: Tensor, sizes_E: Sequence[int]
) -> list[list[Tensor]]:
    """Return each expert's squared gradient norm, summed over samples, for matrices that share an input.

    Args:
        x_SI: Rows sorted by expert, and within an expert by sample; shape (S, I).
        grads_SO: The matrices' output gradients, each of shape (S, O).
        samples_S: The sample that each row belongs to, int64, shape (S,).
        sizes_E: Rows of each expert.

    Returns:
        For each matrix, one float32 scalar per expert.
    """
    norms: list[list[Tensor]] = [[] for _ in grads_SO]
    parts = zip(torch.split(x_SI, list(sizes_E)), torch.split(samples_S, list(sizes_E)), strict=True)
    grad_parts = zip(*(torch.split(grad, list(sizes_E)) for grad in grads_SO), strict=True)
    for (x, samples), grads in zip(parts, grad_parts, strict=True):
        x_rows = x.float()
        if gram_is_cheaper(len(x), x.shape[1], grads[0].shape[1]):
            gram = (x_rows @ x_rows.t()).masked_fill(samples[:, None] != samples, 0.0)
            for expert_norms, grad in zip(norms, grads, strict=True):
                expert_norms.append((gram * (grad.float() @ grad.float().t())).sum())
        else:
            runs = torch.unique_consecutive(samples, return_counts=True)[1].tolist()
            rows = [Rows(run[None]) for run in torch.split(x_rows, runs)]
            for expert_norms, grad in zip(norms, grads, strict=True):
                pieces = zip(rows, torch.split(grad, runs), strict=True)
                expert_norms.append(torch.stack([run.squared_norms(g[None])[0] for run, g in pieces]).sum())
    return norms


def gram_is_cheaper(positions: int, width_in: int, width_out: int) -> bool:
    """Return whether two Gram matrices cost fewer multiply-adds than the gradient itself."""
    return positions * (width_in + width_out) <= width_in * width_out
