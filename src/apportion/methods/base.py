"""What every planning method is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from apportion.methods.targets import ALL_TARGETS, parse_targets
from apportion.records.plan import Placement
from apportion.records.profile import Profile
from apportion.records.site import Site


class MethodOptions(BaseModel):
    """Options that every method takes; a method with more of them subclasses this.

    Args:
        targets: What is adapted: kinds (``attention``, ``router``, ``experts``, ``shared``, ``dense``) or single
            projections (``experts.down``, ``attention.q``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: tuple[str, ...] = ALL_TARGETS

    @field_validator("targets", mode="before")
    @classmethod
    def _split_targets(cls, value: Any) -> Any:
        return parse_targets(value)


@dataclass(frozen=True)
class AdapterSettings:
    """How large every adapter is, and the seed of methods that draw at random."""

    rank: int
    alpha: float
    seed: int

    def at(self, sites: Iterable[Site]) -> list[Placement]:
        """Place one plain LoRA of these settings on each site."""
        return [Placement(site=site.name, rank=self.rank, alpha=self.alpha) for site in sites]


@dataclass(frozen=True)
class Method:
    """One planning method.

    Args:
        name: What the user types.
        summary: One line.
        source: Paper or repository.
        options: Its options with their defaults.
        place: The rule: profile, options and settings in, placements out. It reads no model.
    """

    name: str
    summary: str
    source: str
    options: type[MethodOptions]
    place: Callable[[Profile, Any, AdapterSettings], list[Placement]]
