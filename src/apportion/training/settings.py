"""Settings of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from apportion.errors import ConfigurationError
from apportion.records.options import SparseTraining, read_options


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a run. The defaults are meant for adapters of rank 32.

    Args:
        epochs: Passes over the data, if `steps` is not given.
        steps: Optimizer steps; overrides `epochs`.
        lr: Peak learning rate.
        batch_size: Rows per device and forward pass.
        gradient_accumulation: Batches per optimizer step.
        max_length: Maximum number of tokens per row; longer rows are truncated.
        seed: Seed of the factors' initial values and of the row order.
        warmup_frac: Fraction of the steps used for warm-up. The learning rate then decays as a cosine.
        weight_decay: AdamW's weight decay.
        max_grad_norm: Maximum gradient norm for clipping.
        dropout: Dropout probability of the adapters' inputs.
        router_aux_loss: Weight of the model's own load-balancing loss; 0 disables it.
        balance_loss: Weight of the balance loss of routed LoRA layers; 0 disables it.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        bf16: Use bfloat16 autocast.
        save_every: Steps between checkpoints.
        sparse: Options of the two phases of sparse plans; a dictionary is also accepted.
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
        """Convert a dictionary of options of sparse plans."""
        if isinstance(self.sparse, Mapping):
            object.__setattr__(self, "sparse", read_options(SparseTraining, self.sparse, "training of sparse plans"))

    def check(self) -> None:
        """Check that all settings are in range.

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
                raise ConfigurationError(f"{name}={getattr(self, name)} is negative.", fix="give 0 or more")
        if not self.lr > 0:
            raise ConfigurationError(f"lr={self.lr} trains nothing.", fix="give a number above 0")

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON. Of the options of sparse plans, only those that were given are included."""
        return asdict(self) | {"sparse": self.sparse.model_dump(mode="json", include=set(self.sparse.given))}

    def resolved(self) -> dict[str, Any]:
        """Return all settings as plain data, defaults included."""
        settings = asdict(self) | self.sparse.model_dump(mode="json")
        del settings["sparse"]
        return settings
