"""The balance loss of routed LoRA layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from apportion.adapters.balance import BalanceSums
from apportion.adapters.shapes.routed import Routed
from apportion.errors import ConfigurationError, TrainingError
from apportion.peft.hosted import hosted
from apportion.training.procedures.base import TrainingHooks


class BalanceLoss(TrainingHooks):
    """Add the mean balance loss of a model's routed LoRA layers, in the form of Switch Transformer.

    Args:
        weight: Its weight in the loss.

    Source: Switch Transformer, arXiv:2101.03961, equation 4. LoRA-SMoE, arXiv:2505.06272, does not give the form.
    Differs: padding is excluded; the loss is a mean over layers, so that one weight suits plans of any size.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.shapes: list[Routed] = []
        self.sums: list[BalanceSums] = []

    def attach(self, model: PeftModel, adapter_name: str, *, num_steps: int, seed: int) -> None:
        """Let the model's routed layers record.

        Args:
            model: The model with the adapter.
            adapter_name: The adapter.
            num_steps: Not used.
            seed: Not used.

        Raises:
            ConfigurationError: the adapter has no site with several LoRA experts.
        """
        self.shapes = [shape for _, shape in hosted(model, adapter_name) if isinstance(shape, Routed)]
        if not self.shapes:
            raise ConfigurationError(
                "balance_loss is set, but the adapter has no site with several LoRA experts.",
                fix="leave it out, or plan with lora_smoe, mola or uniform",
            )
        self.sums = [BalanceSums() for _ in self.shapes]
        for shape, sums in zip(self.shapes, self.sums, strict=True):
            shape.balance = sums

    def before_forward(self, inputs: Mapping[str, Any]) -> None:
        """Reset the sums. Tokens with ``attention_mask`` 0 will not count.

        Args:
            inputs: The batch.
        """
        attention_mask = inputs.get("attention_mask")
        real_T = None if attention_mask is None else attention_mask.reshape(-1) != 0
        for sums in self.sums:
            sums.real_T, sums.loss = real_T, None

    def penalty(self) -> Tensor:
        """Return the weighted mean over the layers that the last pass used. It is `weight` if all are balanced.

        Returns:
            A scalar.

        Raises:
            TrainingError: it has no gradient.
        """
        used = [sums.loss for sums in self.sums if sums.loss is not None]
        if not used:
            return torch.zeros(())
        mean = torch.stack([loss.to(used[0].device) for loss in used]).mean()
        if not mean.requires_grad:
            raise TrainingError(
                "the balance loss has no gradient, so it would have no effect: reentrant gradient checkpointing "
                "detaches it.",
                fix="use use_reentrant=False, or leave the balance loss out",
            )
        return mean * self.weight

    def detach(self) -> None:
        """Stop recording."""
        for shape, sums in zip(self.shapes, self.sums, strict=True):
            shape.balance = None
            sums.real_T = sums.loss = None
