"""Baselines: LoRA on everything that is targeted, and LoRA on attention alone."""

from __future__ import annotations

from apportion.methods.base import AdapterSettings, Method, MethodOptions
from apportion.records.placement import Placement
from apportion.records.profile import Profile


def place_lora(profile: Profile, options: MethodOptions, settings: AdapterSettings) -> list[Placement]:
    """Adapt every targeted site: attention, router, all experts, shared experts, dense MLPs.

    Args:
        profile: For its layout alone.
        options: Targets.
        settings: Rank and scale.

    Returns:
        One plain LoRA a site.

    Raises:
        ConfigurationError: the model has nothing for a target.

    Source: LoRA, arXiv:2106.09685.
    Differs: nothing.
    """
    return settings.at(options.select(profile.layout))


def place_attention(profile: Profile, options: MethodOptions, settings: AdapterSettings) -> list[Placement]:
    """Adapt the attention matrices among the targets.

    Args:
        profile: For its layout alone.
        options: Targets.
        settings: Rank and scale.

    Returns:
        One plain LoRA a site.

    Raises:
        ConfigurationError: the model has nothing for a target.

    Source: LoRA, arXiv:2106.09685, which adapts attention alone.
    Differs: all attention matrices, not the query's and the value's alone.
    """
    return settings.at(site for site in options.select(profile.layout) if site.kind == "attention")


LORA = Method(
    name="lora",
    summary="LoRA on attention, router and every expert: the baseline",
    source="LoRA, arXiv:2106.09685",
    options=MethodOptions,
    place=place_lora,
)
ATTENTION = Method(
    name="attention",
    summary="LoRA on attention alone: the floor",
    source="LoRA, arXiv:2106.09685",
    options=MethodOptions,
    place=place_attention,
)
