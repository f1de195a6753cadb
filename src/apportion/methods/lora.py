"""Baselines: LoRA on all targets, and LoRA on attention only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apportion.errors import ConfigurationError
from apportion.methods.base import AdapterSettings, Method
from apportion.methods.targets import targeted_sites
from apportion.records.options import MethodOptions
from apportion.records.placement import Placement

if TYPE_CHECKING:
    from apportion.records.profile import Profile


def place_lora(profile: Profile, options: MethodOptions, settings: AdapterSettings) -> list[Placement]:
    """Adapt every targeted site: attention, router, all experts, shared experts, dense MLPs.

    Args:
        profile: Only its layout is used.
        options: Targets.
        settings: Rank and scale.

    Returns:
        One LoRA per site.

    Raises:
        ConfigurationError: the model has no site for a target.

    Source: LoRA, arXiv:2106.09685.
    Differs: nothing.
    """
    return settings.at(targeted_sites(options, profile.layout))


def place_attention(profile: Profile, options: MethodOptions, settings: AdapterSettings) -> list[Placement]:
    """Adapt the attention matrices among the targets.

    Args:
        profile: Only its layout is used.
        options: Targets.
        settings: Rank and scale.

    Returns:
        One LoRA per site.

    Raises:
        ConfigurationError: the model has no site for a target, or a target or a rank of another kind was given.

    Source: LoRA, arXiv:2106.09685, which adapts only attention.
    Differs: all attention matrices, not only query and value.
    """
    targets = options.targets if "targets" in options.given else ()
    other = next((name for name in (*targets, *options.ranks) if name.partition(".")[0] != "attention"), None)
    if other:
        raise ConfigurationError(
            f"the method attention adapts only attention, but {other} was given a target or a rank.",
            fix=f"remove {other}, or use --method lora",
        )
    return settings.at(site for site in targeted_sites(options, profile.layout) if site.kind == "attention")


LORA = Method(
    name="lora",
    summary="baseline: LoRA on attention, router and every expert",
    source="LoRA, arXiv:2106.09685",
    options=MethodOptions,
    place=place_lora,
)
ATTENTION = Method(
    name="attention",
    summary="baseline: LoRA on attention only",
    source="LoRA, arXiv:2106.09685",
    options=MethodOptions,
    place=place_attention,
)
