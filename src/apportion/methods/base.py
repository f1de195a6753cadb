"""What every planning method is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from apportion.errors import ConfigurationError, PlanError
from apportion.methods.targets import ALL_TARGETS, parse_layers, parse_targets, select_sites
from apportion.records.placement import Placement
from apportion.records.profile import Profile
from apportion.records.shapes import lora_shape
from apportion.records.site import KINDS, Layout, Site


class MethodOptions(BaseModel):
    """Options that every method takes; a method with more of them subclasses this.

    Args:
        targets: What is adapted: kinds (``attention``, ``router``, ``experts``, ``shared``, ``dense``) or single
            projections (``experts.down``, ``attention.q``).
        layers: Decoder layers that are adapted, such as ``4-15`` or ``0,2,4-7``; all where not given.
        ranks: Ranks of single kinds, where they differ from the plan's; the scale alpha / rank stays the plan's.
        sparsity: Share of the entries of B that stay zero, with A frozen, as LoRI does; 0 for whole factors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: tuple[str, ...] = ALL_TARGETS
    layers: str | None = None
    ranks: dict[str, int] = {}
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @field_validator("targets", mode="before")
    @classmethod
    def _split_targets(cls, value: Any) -> Any:
        return parse_targets(value)

    @field_validator("ranks")
    @classmethod
    def _know_kinds(cls, value: dict[str, int]) -> dict[str, int]:
        for kind, rank in value.items():
            if kind not in KINDS:
                raise ConfigurationError(
                    f"there is no kind {kind!r} to give a rank.\n  fix:  choose among {', '.join(KINDS)}"
                )
            if rank < 1:
                raise ConfigurationError(
                    f"rank={rank} of {kind} is not a rank.\n  fix:  give a whole number of at least 1"
                )
        return value

    def select(self, layout: Layout) -> list[Site]:
        """Give the sites that targets and layers leave, in the layout's order.

        Args:
            layout: The model's sites.

        Returns:
            The sites.

        Raises:
            ConfigurationError: the model has nothing for a target, a layer or a kind with a rank of its own.
        """
        by_name = self.targets != type(self).model_fields["targets"].default
        sites = select_sites(layout, self.targets, parse_layers(self.layers, layout), by_name=by_name)
        for kind in self.ranks:
            if not any(site.kind == kind for site in sites):
                raise ConfigurationError(
                    f"a rank was given for {kind}, and no {kind} is adapted.\n"
                    f"  model:  {layout.describe()}\n  fix:    leave the rank out, or add {kind} to the targets"
                )
        return sites


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
            raise PlanError(f"{error}\n  place:  {site.name}") from error
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
