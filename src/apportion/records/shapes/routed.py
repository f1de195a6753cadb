"""The shape `routed`: LoRA-SMoE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from apportion.errors import PlanError
from apportion.records.numbers import WholeNumber
from apportion.records.shapes.base import MAX_WIDTH, Part
from apportion.records.shapes.low_rank import LowRank
from apportion.records.shapes.sparse import Sparse


@dataclass(frozen=True)
class Routed:
    """LoRA-SMoE: several LoRA experts of one shape, and a linear router that weights them per token.

    Args:
        expert: Shape of each LoRA expert.
        num_experts: Number of LoRA experts, at least 2.
        top_k: LoRA experts used per token.

    Source: LoRA-SMoE, arXiv:2505.06272.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: ClassVar[str] = "routed"

    expert: LowRank | Sparse
    num_experts: WholeNumber
    top_k: WholeNumber

    def __post_init__(self) -> None:
        """Check the fields."""
        if not 1 <= self.top_k <= self.num_experts:
            raise PlanError(
                f"an adapter has {self.num_experts} LoRA experts and cannot use {self.top_k} of them per token.",
                fix="give a top_k from 1 to the number of LoRA experts",
            )
        if self.num_experts < 2 or self.num_experts * self.expert.rank > MAX_WIDTH:
            raise PlanError(
                f"an adapter has {self.num_experts} LoRA experts of rank {self.expert.rank}.",
                fix=f"give at least 2 experts, with experts times rank at most {MAX_WIDTH}",
            )

    @property
    def rank(self) -> int:
        """Rank of each LoRA expert."""
        return self.expert.rank

    @property
    def alpha(self) -> float:
        """Scale numerator of each LoRA expert."""
        return self.expert.alpha

    @property
    def lora_rank(self) -> None:
        """None: gates depend on the input, so no plain LoRA is equivalent."""
        return

    def check(self, in_features: int, out_features: int) -> None:
        """Accept the matrices that an expert accepts."""
        self.expert.check(in_features, out_features)

    def parts(self, in_features: int, out_features: int) -> Iterator[Part]:
        """Return the stacked factors of the experts, and the router of shape (experts, in)."""
        for part in self.expert.parts(in_features, out_features):
            yield part._replace(entries=self.num_experts * part.entries)
        yield Part(self.num_experts * in_features)

    def flops(self, in_features: int, out_features: int) -> int:
        """Count the operations per token. All experts are computed, in one product."""
        return self.num_experts * (self.expert.flops(in_features, out_features) + 2 * in_features)
