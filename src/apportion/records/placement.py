"""`Placement`: one adapter at one site; and groups of placements in short form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from apportion.records.braces import fold_braces
from apportion.records.shapes.base import Shape
from apportion.records.shapes.routed import Routed
from apportion.records.shapes.sparse import Sparse
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
        """The site's name, parsed."""
        return SiteName.parse(self.site)

    @property
    def rank(self) -> int:
        """Rank of the factors (of each LoRA expert, if there are several)."""
        return self.shape.rank

    @property
    def alpha(self) -> float:
        """Scale numerator: the adapter's output is multiplied by alpha / rank."""
        return self.shape.alpha

    @property
    def scale(self) -> float:
        """Factor on the adapter's output: alpha / rank."""
        return self.shape.alpha / self.shape.rank

    @property
    def num_experts(self) -> int:
        """Number of LoRA experts at the site; 1 for plain LoRA."""
        return self.shape.num_experts if isinstance(self.shape, Routed) else 1

    @property
    def top_k(self) -> int:
        """LoRA experts used per token."""
        return self.shape.top_k if isinstance(self.shape, Routed) else 1

    @property
    def sparsity(self) -> float:
        """Share of the entries of B that stay zero."""
        shape = self.shape.expert if isinstance(self.shape, Routed) else self.shape
        return shape.sparsity if isinstance(shape, Sparse) else 0.0

    @property
    def total_rank(self) -> int:
        """Sum of the ranks of all LoRA experts: the number of rows of A."""
        return self.num_experts * self.rank

    @property
    def is_routed(self) -> bool:
        """Whether gates depend on the input, so that the adapter cannot be merged into a weight."""
        return self.shape.lora_rank is None


class PlacementGroup(NamedTuple):
    """Placements of one shape, with site names folded into braces: ``a.{0,3}.{gate,up}``."""

    shape: Shape
    sites: tuple[str, ...]


def group_placements(placements: Iterable[Placement]) -> list[PlacementGroup]:
    """Group placements by shape and fold their site names into braces.

    Args:
        placements: The placements.

    Returns:
        One group per shape, in order of first appearance.
    """
    groups: dict[Shape, list[str]] = {}
    for placement in placements:
        groups.setdefault(placement.shape, []).append(placement.site)
    return [PlacementGroup(shape, tuple(fold_braces(names))) for shape, names in groups.items()]
