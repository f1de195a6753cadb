"""What the kernels for a CPU run: a layer's frozen experts, the tokens routed to them, and their low-rank terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apportion.adapters.kernels.cpu.matrices import FrozenMatrices
from apportion.adapters.kernels.terms import LowRankTerm
from apportion.experts.forms import ExpertForm

# Shapes: T tokens, K experts per token.


@dataclass(frozen=True)
class RoutedExperts:
    """Frozen experts, and the rows that are routed to them.

    Args:
        module: The experts module.
        form: Its form: called with routed tokens, without a norm after each expert.
        matrices: The matrices by parameter, in the form's order.
        ids_TK: Expert ids, shape (T, K).
        terms: The low-rank terms by parameter.
        dropout: Share of the terms' inputs that is dropped.
    """

    module: nn.Module
    form: ExpertForm
    matrices: Mapping[str, FrozenMatrices]
    ids_TK: Tensor
    terms: Mapping[str, Sequence[LowRankTerm]]
    dropout: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """The type that the experts compute in."""
        return next(iter(self.matrices.values())).weight.dtype
