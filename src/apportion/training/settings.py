"""What a training run is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args

from apportion.errors import ConfigurationError
from apportion.peft.masks import Granularity


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one run; the defaults suit an adapter of rank 32.

    Args:
        epochs: Passes over the data, where `steps` is not given.
        steps: Optimizer steps; overrides `epochs`.
        lr: Peak learning rate.
        batch_size: Rows a device and step.
        gradient_accumulation: Batches an optimizer step.
        max_length: Tokens of a row that are kept.
        seed: Seed of the factors' start and of the rows' order.
        warmup_frac: Share of the steps over which the learning rate rises; after them it falls as a cosine.
        weight_decay: AdamW's weight decay.
        max_grad_norm: Norm that gradients are clipped to.
        dropout: Share of the adapters' inputs that is dropped.
        router_aux_loss: Weight of the model's own load-balancing loss; 0 leaves it out.
        balance_loss: Weight of the balance loss of routed LoRA layers; 0 leaves it out.
        gradient_checkpointing: Recompute activations in the backward pass, for less memory and more time.
        bf16: Compute in bfloat16 where autocast allows it.
        save_every: Steps between two checkpoints.
        dense_steps: Of sparse plans, steps of the first phase; a tenth of the second's where not given.
        dense_lr: Of sparse plans, the first phase's learning rate; a tenth of `lr` where not given.
        mask_granularity: Of sparse plans, over what the largest entries are sought.
        redraw_a: Of sparse plans, draw another A for the second phase, as LoRI's released code does.
        store_a: Of sparse plans, keep the frozen A in the checkpoint.
    """

    epochs: float = 3.0
    steps: int | None = None
    lr: float = 4e-4
    batch_size: int = 16
    gradient_accumulation: int = 1
    max_length: int = 1024
    seed: int = 0
    warmup_frac: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dropout: float = 0.0
    router_aux_loss: float = 0.0
    balance_loss: float = 0.0
    gradient_checkpointing: bool = False
    bf16: bool = False
    save_every: int = 100
    dense_steps: int | None = None
    dense_lr: float | None = None
    mask_granularity: Granularity = "global"
    redraw_a: bool = False
    store_a: bool = False

    def check(self) -> None:
        """Refuse settings that no run can have.

        Raises:
            ConfigurationError: a setting is out of range.
        """
        at_least_one = ("batch_size", "gradient_accumulation", "max_length", "save_every")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)} is too small.", fix="give at least 1")
        if self.steps is not None and self.steps < 1:
            raise ConfigurationError(f"steps={self.steps} trains nothing.", fix="give at least 1")
        if self.steps is None and not self.epochs > 0:
            raise ConfigurationError(f"epochs={self.epochs} trains nothing.", fix="give a number above 0")
        if self.dense_steps is not None and self.dense_steps < 2:
            raise ConfigurationError(
                f"dense_steps={self.dense_steps} finds no mask: the first step warms up.", fix="give at least 2"
            )
        if self.dense_lr is not None and not self.dense_lr > 0:
            raise ConfigurationError(f"dense_lr={self.dense_lr} trains nothing.", fix="give a number above 0")
        if self.mask_granularity not in get_args(Granularity):
            known = ", ".join(get_args(Granularity))
            raise ConfigurationError(f"mask_granularity={self.mask_granularity!r} is none of {known}.")
        for name in ("router_aux_loss", "balance_loss"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"{name}={getattr(self, name)} is no weight.", fix="give 0 or more")
        if not self.lr > 0:
            raise ConfigurationError(f"lr={self.lr} trains nothing.", fix="give a number above 0")

    def of_sparse_plans(self) -> list[str]:
        """Name the settings that were given and that sparse plans alone have."""
        names = ("dense_steps", "dense_lr", "mask_granularity", "redraw_a", "store_a")
        return [name for name in names if getattr(self, name) != type(self).__dataclass_fields__[name].default]

    def as_dict(self) -> dict[str, Any]:
        """Give plain data for JSON."""
        return asdict(self)
