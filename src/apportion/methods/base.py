"""What every planning method is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from apportion.errors import PlanError
from apportion.records.options import MethodOptions
from apportion.records.placement import Placement
from apportion.records.shapes import lora_shape
from apportion.records.site import Site

if TYPE_CHECKING:  # the table of methods is read where no tensor is needed
    from apportion.records.profile import Profile


@dataclass(frozen=True)
class AdapterSettings:
    """How large every adapter is, and the seed of methods that draw at random."""

    rank: int
    alpha: float
    seed: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    sparsity: float = 0.0

    def at(self, sites: Iterable[Site]) -> list[Placement]:
        """Place one plain LoRA on each site, of its kind's rank, all at the same scale alpha / rank."""
        return [self.place(site) for site in sites]

    def place(self, site: Site, num_experts: int = 1, top_k: int = 1) -> Placement:
        """Place LoRA experts on a site, of its kind's rank, at the plan's scale alpha / rank.

        Args:
            site: The site.
            num_experts: LoRA experts.
            top_k: LoRA experts that a token uses; all where the site has fewer.

        Returns:
            The placement.

        Raises:
            PlanError: no adapter can have these numbers.
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
        name: What the user types.
        summary: One line.
        source: Paper or repository.
        options: Its options with their defaults.
        place: The rule: profile, options and settings in, placements out. It reads no model.
        reads_tasks: Whether the plan's size depends on the profile's tasks or gradients, so that nothing can stand for
            one.
    """

    name: str
    summary: str
    source: str
    options: type[MethodOptions]
    place: Callable[[Profile, Any, AdapterSettings], list[Placement]]
    reads_tasks: bool = False
