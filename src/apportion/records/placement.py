"""`Placement`: one adapter at one site; and placements gathered into lines that people can read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from apportion.records.braces import fold_braces
from apportion.records.shapes import Routed, Shape, Sparse
from apportion.records.site_name import SiteName


@dataclass(frozen=True, slots=True)
class Placement:
    """One adapter at one site.

    Args:
        site: The site's name.
        shape: The adapter's shape.
    """

    site: str
    shape: Shape

    @property
    def name(self) -> SiteName:
        """The site's name, taken apart."""
        return SiteName.parse(self.site)

    @property
    def rank(self) -> int:
        """Rank of the factors, of every LoRA expert where there are several."""
        return self.shape.rank

    @property
    def alpha(self) -> float:
        """Scale numerator: the adapter's output is multiplied by alpha / rank."""
        return self.shape.alpha

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied by."""
        return self.shape.alpha / self.shape.rank

    @property
    def num_experts(self) -> int:
        """LoRA experts at the site; one is plain LoRA."""
        return self.shape.num_experts if isinstance(self.shape, Routed) else 1

    @property
    def top_k(self) -> int:
        """LoRA experts that a token uses."""
        return self.shape.top_k if isinstance(self.shape, Routed) else 1

    @property
    def sparsity(self) -> float:
        """Share of the entries of B that stay zero."""
        shape = self.shape.expert if isinstance(self.shape, Routed) else self.shape
        return shape.sparsity if isinstance(shape, Sparse) else 0.0

    @property
    def total_rank(self) -> int:
        """Rank over all LoRA experts: the rows of A."""
        return self.num_experts * self.rank

    @property
    def is_routed(self) -> bool:
        """Whether a gate depends on the input, so that no weight equals the adapter."""
        return self.shape.lora_rank is None


class PlacementGroup(NamedTuple):
    """Placements of one shape, the names of their sites written with braces: ``a.{0,3}.{gate,up}``."""

    shape: Shape
    sites: tuple[str, ...]


def group_placements(placements: Iterable[Placement]) -> list[PlacementGroup]:
    """Gather placements of equal shape, with one line of braces for the experts of a layer.

    Args:
        placements: The placements.

    Returns:
        A group per shape, in the order in which shapes first come.
    """
    groups: dict[Shape, list[str]] = {}
    for placement in placements:
        groups.setdefault(placement.shape, []).append(placement.site)
    return [PlacementGroup(shape, tuple(fold_braces(names))) for shape, names in groups.items()]
