"""A plan bound to a model: what the tuner attaches, found and checked once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from apportion.errors import PlanMismatchError
from apportion.peft.start import FrozenDraws
from apportion.records.placement import Placement
from apportion.records.plan import Plan
from apportion.records.site import Layout, Site, Storage


@dataclass(frozen=True)
class BoundPlan:
    """A plan, and the model's sites.

    Args:
        plan: The plan.
        layout: The model's sites.
        frozen: The frozen A matrices, until they are in the model.
        kept: Kept entries of every sparse B by site; None if they are loaded next, or all of B trains.
        is_loaded: Whether a checkpoint of the adapter is loaded next, so that only what it lacks is drawn.
    """

    plan: Plan
    layout: Layout
    frozen: FrozenDraws | None = None
    kept: Mapping[str, Tensor] | None = None
    is_loaded: bool = False

    @cached_property
    def modules(self) -> dict[str, list[Placement]]:
        """Placements by the path of the module that hosts them: one for a matrix of its own, many for stacked experts.

        Returns:
            The placements.

        Raises:
            PlanMismatchError: the model lacks a planned site.
        """
        modules: dict[str, list[Placement]] = defaultdict(list)
        for placement in self.plan.placements:
            site = self.layout.by_name.get(placement.site)
            if site is None:
                raise PlanMismatchError(
                    f"the adapter has a site {placement.site}, which this model lacks.",
                    details={"model": self.layout.describe(), "adapter": f"made for {self.plan.model}"},
                )
            modules[placement.name.module if site.storage == "fused" else site.name].append(placement)
        return dict(modules)

    def storage(self, path: str) -> Storage:
        """Return how a planned module stores its weights."""
        return self._site(path).storage

    @property
    def routed_linear_sites(self) -> list[str]:
        """Planned linear layers that receive routed tokens."""
        sites = [self._site(path) for path in self.modules]
        return [site.name for site in sites if site.storage == "linear" and site.kind == "experts"]

    def _site(self, path: str) -> Site:
        """Return a planned module's first site."""
        return self.layout.by_name[self.modules[path][0].site]


_BINDING: ContextVar[BoundPlan | None] = ContextVar("binding", default=None)


@contextmanager
def binding(bound: BoundPlan) -> Iterator[None]:
    """Let the tuner attach a bound plan inside the context. PEFT passes a tuner only the configuration.

    Args:
        bound: The plan of the adapter that PEFT is asked to add.

    Yields:
        Nothing.
    """
    token = _BINDING.set(bound)
    try:
        yield
    finally:
        _BINDING.reset(token)


def current_binding() -> BoundPlan | None:
    """Return the plan that is being attached, if `binding` provides it."""
    return _BINDING.get()
