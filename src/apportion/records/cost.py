"""What a plan costs, counted from the planned sites."""

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
_ADAM_BYTES = 8  # AdamW keeps two float32 moments a parameter


@dataclass(frozen=True)
class Cost:
    """Exact counts for one plan on one model.

    Args:
        trainable_parameters: Numbers that the optimizer moves.
        stored_parameters: Numbers in the adapter's checkpoint, unless it is to hold the frozen ones too.
        base_parameters: Parameters of the model itself.
        adapter_flops_per_token: Floating-point operations that the adapters add to the forward pass of one token: two
            a multiply-add, an expert's weighted by the routed slots a token that fall on it.
        lora_parameters: Trainable parameters of LoRA of the same rank on every targetable matrix of the model.
        lora_flops_per_token: The same for its operations.
        routing: Where the share of tokens an expert comes from: a ``profile``, ``even`` routing, or ``none`` for a
            model without experts.
        sites_by_kind: Number of planned sites of each kind.
        stored_indices: Positions of kept entries in the checkpoint, where factors are sparse.
        frozen_parameters: Numbers that are drawn from a seed and never move; a checkpoint holds them only on request.
            None where an earlier version counted the plan without them.
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
        """Bytes of the adapter's trained tensors on disk, in float32."""
        return self.stored_parameters * _ADAPTER_BYTES

    @property
    def index_bytes(self) -> int:
        """Bytes of the kept entries' positions on disk, in int32, where factors are sparse."""
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
        """Trainable parameters over those of LoRA on everything."""
        return self.trainable_parameters / self.lora_parameters if self.lora_parameters else 0.0

    @property
    def lora_percentage_ratio(self) -> float:
        """The same ratio between the two percentages of the total, adapters counted in: the figure papers print."""
        if not self.lora_parameters:
            return 0.0
        own = self.trainable_parameters / (self.base_parameters + self.trainable_parameters)
        lora = self.lora_parameters / (self.base_parameters + self.lora_parameters)
        return own / lora

    @property
    def trainable_frac(self) -> float:
        """Trainable parameters over all parameters, adapters counted in."""
        return self.trainable_parameters / (self.base_parameters + self.trainable_parameters)

    @property
    def lora_flops_ratio(self) -> float:
        """Adapter operations over those of LoRA on everything."""
        return self.adapter_flops_per_token / self.lora_flops_per_token if self.lora_flops_per_token else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Give every figure, counted and derived, under its own name."""
        derived = (
            "checkpoint_bytes index_bytes gradient_bytes optimizer_bytes "
            "lora_count_ratio lora_percentage_ratio trainable_frac lora_flops_ratio"
        )
        return asdict(self) | {name: getattr(self, name) for name in derived.split()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Cost:
        """Rebuild a cost from `as_dict`, leaving out what is derived.

        Args:
            data: Plain data.

        Returns:
            The cost.

        Raises:
            PlanError: a counted figure is missing, of another type, negative or not finite.
        """
        counted = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        try:
            return _validator().validate_python(counted)
        except ValidationError as error:
            place, problem = first_problem(error)
            raise PlanError("its cost is impossible.", place=f"cost.{place}", found=str(problem)) from error

    def __str__(self) -> str:
        """Say the headline figure."""
        return f"{self.trainable_parameters:,} trainable parameters"


@cache
def _validator() -> TypeAdapter[Cost]:
    """Prepare the check of a cost's figures."""
    return TypeAdapter(Cost)
