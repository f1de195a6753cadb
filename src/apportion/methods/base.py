"""Base classes of planning methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from apportion.errors import PlanError
from apportion.records.options import MethodOptions
from apportion.records.placement import Placement
from apportion.records.shapes.registry import lora_shape
from apportion.records.site import Site

if TYPE_CHECKING:  # the registry is imported without tensors
    from apportion.records.profile import Profile


@dataclass(frozen=True)
class AdapterSettings:
    """Rank and scale of the adapters, and the random seed."""

    rank: int
    alpha: float
    seed: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    sparsity: float = 0.0

    def at(self, sites: Iterable[Site]) -> list[Placement]:
        """Place one LoRA on each site, with the rank of its kind and the same scale alpha / rank everywhere."""
        return [self.place(site) for site in sites]

    def place(self, site: Site, num_experts: int = 1, top_k: int = 1) -> Placement:
        """Place LoRA experts on a site, with the rank of its kind and the plan's scale alpha / rank.

        Args:
            site: The site.
            num_experts: Number of LoRA experts.
            top_k: LoRA experts used per token; all if the site has fewer.

        Returns:
            The placement.

        Raises:
            PlanError: the number of LoRA experts is out of range.
        """
        rank = self.ranks.get(site.kind, self.rank)
        alpha = self.alpha * rank / self.rank
        top_k = min(top_k, num_experts)
        try:
            shape = lora_shape(rank, alpha, num_experts=num_experts, top_k=top_k, sparsity=self.sparsity)
        except PlanError as error:
            raise error.at(site.name) from error
        return Placement(site.name, shape)


@dataclass(frozen=True)
class Method:
    """One planning method.

    Args:
        name: Name, as given by the user.
        summary: One-line summary.
        source: Paper or repository.
        options: Option model, with defaults.
        place: Function from profile, options and settings to placements. It does not read the model.
        reads_tasks: Whether the plan's size depends on the profile's tasks or gradients, so that costs need a profile.
    """

    name: str
    summary: str
    source: str
    options: type[MethodOptions]
    place: Callable[[Profile, Any, AdapterSettings], list[Placement]]
    reads_tasks: bool = False
