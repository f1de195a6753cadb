"""What a training run is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from apportion.errors import ConfigurationError
from apportion.records.options import SparseTraining, read_options


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
        sparse: Options of sparse plans' two phases; also as a dictionary of those that were given.
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
    sparse: SparseTraining = field(default_factory=SparseTraining)

    def __post_init__(self) -> None:
        """Read the options of sparse plans where they came as a dictionary."""
        if isinstance(self.sparse, Mapping):
            object.__setattr__(self, "sparse", read_options(SparseTraining, self.sparse, "training of sparse plans"))

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
        for name in ("router_aux_loss", "balance_loss"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"{name}={getattr(self, name)} is no weight.", fix="give 0 or more")
        if not self.lr > 0:
            raise ConfigurationError(f"lr={self.lr} trains nothing.", fix="give a number above 0")

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: of the options of sparse plans, those that were given."""
        return asdict(self) | {"sparse": self.sparse.model_dump(mode="json", include=set(self.sparse.given))}

    def resolved(self) -> dict[str, Any]:
        """Return every setting as plain data, in which it makes no difference whether a default was given."""
        settings = asdict(self) | self.sparse.model_dump(mode="json")
        del settings["sparse"]
        return settings
