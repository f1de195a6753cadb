"""Measure where a model routes your data, and place, train and compare LoRA adapters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from apportion._version import __version__

if TYPE_CHECKING:
    from apportion.accounting import cost
    from apportion.errors import ApportionError
    from apportion.formats.export import export
    from apportion.formats.importing import import_adapter
    from apportion.loading import embedded
    from apportion.methods.planning import plan
    from apportion.peft.attach import Receipt, apply
    from apportion.peft.load import load
    from apportion.profiling.run import profile
    from apportion.records.cost import Cost
    from apportion.records.placement import Placement
    from apportion.records.plan import Plan, load_plan
    from apportion.records.profile import Profile, load_profile
    from apportion.records.site import Layout, Site

__all__ = [
    "ApportionError",
    "Cost",
    "Layout",
    "Placement",
    "Plan",
    "Profile",
    "Receipt",
    "Site",
    "__version__",
    "apply",
    "cost",
    "embedded",
    "export",
    "import_adapter",
    "load",
    "load_plan",
    "load_profile",
    "plan",
    "profile",
]

_HOMES = {
    "ApportionError": "apportion.errors",
    "Cost": "apportion.records.cost",
    "Layout": "apportion.records.site",
    "Placement": "apportion.records.placement",
    "Plan": "apportion.records.plan",
    "Profile": "apportion.records.profile",
    "Receipt": "apportion.peft.attach",
    "Site": "apportion.records.site",
    "apply": "apportion.peft.attach",
    "cost": "apportion.accounting",
    "embedded": "apportion.loading",
    "export": "apportion.formats.export",
    "import_adapter": "apportion.formats.importing",
    "load": "apportion.peft.load",
    "load_plan": "apportion.records.plan",
    "load_profile": "apportion.records.profile",
    "plan": "apportion.methods.planning",
    "profile": "apportion.profiling.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first access, so that importing the package is fast."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
