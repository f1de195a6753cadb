"""Low-rank terms of one projection of stacked experts, and joining those that stand on one parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apportion.adapters.factors import SparseFactor
from apportion.adapters.specs import ExpertFactors

# Shapes: H planned experts, N terms of one parameter, I and O the parameter's input and output width, r rank per
# expert, R summed rank of a term's experts.


@dataclass(frozen=True)
class LowRankTerm:
    """LoRA on some experts of one projection.

    Args:
        a_RI: The experts' A, one under the other.
        b_RO: The experts' B transposed, one under the other; dense, or sparse.
        planned: The experts, their ranks and scales.
        columns: The projection's part of the output.
    """

    a_RI: Tensor
    b_RO: Tensor | SparseFactor
    planned: ExpertFactors
    columns: slice

    def to(self, dtype: torch.dtype) -> LowRankTerm:
        """Round the factors, as mixed precision does, gradients passing; the values of a sparse B follow A."""
        b_RO = self.b_RO.to(dtype) if isinstance(self.b_RO, Tensor) else self.b_RO
        return replace(self, a_RI=self.a_RI.to(dtype), b_RO=b_RO)


def join_terms(terms: Sequence[LowRankTerm]) -> Sequence[LowRankTerm]:
    """Join the terms of one parameter, so that every expert has one pair of products where it had two.

    Each expert's A go one under the other, and its B into the columns that they have in the output, zeros beside them.

    Args:
        terms: All that stand on the parameter.

    Returns:
        One term where all plan the same experts with one rank and dense factors; else the terms that were passed.
    """
    if len(terms) < 2 or len({(term.planned.experts, term.planned.ranks, term.planned.scales) for term in terms}) > 1:
        return terms
    first, dense = terms[0].planned, [term.b_RO for term in terms if isinstance(term.b_RO, Tensor)]
    if len(set(first.ranks)) > 1 or len(dense) < len(terms):
        return terms
    num_experts, rank = len(first.experts), first.ranks[0]
    a_HNrI = torch.stack([term.a_RI.view(num_experts, rank, -1) for term in terms], 1)
    b_HNrO = a_HNrI.new_zeros((num_experts, len(terms), rank, sum(b_RO.shape[1] for b_RO in dense)))
    for number, (term, b_RO) in enumerate(zip(terms, dense, strict=True)):
        b_HNrO[:, number, :, term.columns] = b_RO.view(num_experts, rank, -1)
    planned = replace(first, ranks=(len(terms) * rank,) * num_experts)
    return [LowRankTerm(a_HNrI.flatten(0, 2), b_HNrO.flatten(0, 2), planned, slice(None))]
