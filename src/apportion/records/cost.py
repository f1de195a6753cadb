"""The cost of a plan, counted from its sites."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from apportion.errors import PlanError
from apportion.records.numbers import Amount, Count, Size, first_problem

RoutingSource = Literal["profile", "even", "none"]

_ADAPTER_BYTES = 4  # adapters are trained and stored in float32
_INDEX_BYTES = 4
_ADAM_BYTES = 8  # AdamW keeps two float32 moments per parameter


@dataclass(frozen=True)
class Cost:
    """Exact counts for one plan on one model.

    Args:
        trainable_parameters: Trainable parameters of the adapters.
        stored_parameters: Adapter parameters in the checkpoint, without frozen ones.
        base_parameters: Parameters of the base model.
        adapter_flops_per_token: Floating-point operations that the adapters add to the forward pass per token. A
            multiply-add counts as two. Experts are weighted by their routed slots per token.
        lora_parameters: Trainable parameters of LoRA of the same rank on every targeted matrix.
        lora_flops_per_token: Operations per token of the same LoRA.
        routing: Source of the routing: ``profile``, ``even`` routing, or ``none`` for a model without experts.
        sites_by_kind: Number of planned sites of each kind.
        stored_indices: Number of stored positions of kept entries, for sparse factors.
        frozen_parameters: Frozen parameters drawn from a seed. A checkpoint stores them only on request. None for plans
            of an earlier version, which did not count them.
    """

    trainable_parameters: Count
    stored_parameters: Count
    base_parameters: Size
    adapter_flops_per_token: Amount
    lora_parameters: Count
    lora_flops_per_token: Amount
    routing: RoutingSource
    sites_by_kind: dict[str, Count]
    stored_indices: Count = 0
    frozen_parameters: Count | None = 0

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the trained tensors on disk, in float32."""
        return self.stored_parameters * _ADAPTER_BYTES

    @property
    def index_bytes(self) -> int:
        """Bytes of the positions of kept entries on disk, in int32."""
        return self.stored_indices * _INDEX_BYTES

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients, in float32."""
        return self.trainable_parameters * _ADAPTER_BYTES

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of AdamW's two moments, in float32."""
        return self.trainable_parameters * _ADAM_BYTES

    @property
    def lora_count_ratio(self) -> float:
        """Trainable parameters divided by those of LoRA on all targets."""
        return self.trainable_parameters / self.lora_parameters if self.lora_parameters else 0.0

    @property
    def lora_percentage_ratio(self) -> float:
        """Ratio of the two percentages of all parameters, including adapters, as reported in papers."""
        if not self.lora_parameters:
            return 0.0
        lora_frac = self.lora_parameters / (self.base_parameters + self.lora_parameters)
        return self.trainable_frac / lora_frac

    @property
    def trainable_frac(self) -> float:
        """Trainable parameters divided by all parameters, including adapters."""
        return self.trainable_parameters / (self.base_parameters + self.trainable_parameters)

    @property
    def lora_flops_ratio(self) -> float:
        """Adapter operations divided by those of LoRA on all targets."""
        return self.adapter_flops_per_token / self.lora_flops_per_token if self.lora_flops_per_token else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return all counted and derived figures by name."""
        derived = (
            "checkpoint_bytes index_bytes gradient_bytes optimizer_bytes "
            "lora_count_ratio lora_percentage_ratio trainable_frac lora_flops_ratio"
        )
        return asdict(self) | {name: getattr(self, name) for name in derived.split()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Cost:
        """Rebuild a cost from `as_dict`, ignoring derived figures.

        Args:
            data: Plain data.

        Returns:
            The cost.

        Raises:
            PlanError: a counted figure is missing, of the wrong type, negative or not finite.
        """
        counted = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        try:
            return _validator().validate_python(counted)
        except ValidationError as error:
            place, problem = first_problem(error)
            raise PlanError("its cost is invalid.", place=f"cost.{place}", found=str(problem)) from error

    def __str__(self) -> str:
        """Return the number of trainable parameters as text."""
        return f"{self.trainable_parameters:,} trainable parameters"


@cache
def _validator() -> TypeAdapter[Cost]:
    """Return the cached validator of a cost."""
    return TypeAdapter(Cost)
