"""The balance loss of routed LoRA layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apportion.adapters.balance import BalanceSums
from apportion.adapters.hosts.linear import LinearLora
from apportion.errors import ConfigurationError, TrainingError


class BalanceLoss:
    """Compute the mean balance loss of a model's routed LoRA layers, in the form of Switch Transformer.

    Call `begin` before a forward pass in training and `loss` after it. `end` makes the layers stop recording.

    Args:
        model: A model with adapters.

    Raises:
        ConfigurationError: no adapter of the model has several LoRA experts.

    Source: Switch Transformer, arXiv:2101.03961, equation 4. LoRA-SMoE, arXiv:2505.06272, does not give the form.
    Differs: padding is excluded; the loss is a mean over layers, so that one weight suits plans of any size.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, LinearLora) and module.lora_router]
        if not self.layers:
            raise ConfigurationError(
                "balance_loss is set, but no adapter has several LoRA experts.",
                fix="leave it out, or plan with lora_smoe, mola or uniform",
            )
        self.sums = [BalanceSums() for _ in self.layers]
        for layer, sums in zip(self.layers, self.sums, strict=True):
            layer.balance.update(dict.fromkeys(layer.lora_router, sums))

    def begin(self, attention_mask: Tensor | None) -> None:
        """Reset the sums for the next forward pass.

        Args:
            attention_mask: Nonzero for tokens that are not padding, shape (sequences, positions); None if none is.
        """
        real_T = None if attention_mask is None else attention_mask.reshape(-1) != 0
        for sums in self.sums:
            sums.real_T, sums.loss = real_T, None

    def loss(self) -> Tensor:
        """Return the mean over the layers that the last pass used. It is 1 if every layer is balanced.

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
        return mean

    def end(self) -> None:
        """Stop recording."""
        for layer, sums in zip(self.layers, self.sums, strict=True):
            layer.balance.clear()
            sums.real_T = sums.loss = None
