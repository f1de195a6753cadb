"""Controls: `random` and `cold` experts, at the same number a layer as `hellora` would keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apportion.methods.base import AdapterSettings, Method
from apportion.methods.hot import (
    coldest,
    drawn,
    experts_kept,
    heat,
    layer_seed,
    rows_of_blocks,
    sites_with_experts,
)
from apportion.records.options import HotOptions
from apportion.records.placement import Placement

if TYPE_CHECKING:
    from apportion.records.profile import Profile


def place_random(profile: Profile, options: HotOptions, settings: AdapterSettings) -> list[Placement]:
    """Draw as many experts of each layer as `hellora` would keep, whatever their heat.

    Args:
        profile: For the number of experts a layer, where `hot` is a coverage.
        options: As for `hellora`.
        settings: Rank, scale and the seed of the draw.

    Returns:
        One plain LoRA a site.

    Raises:
        ConfigurationError: the model is dense, or `hot` does not fit it.
        ProfileError: a layer has no routed token.

    Source: the usual control of placement studies; HELLoRA, arXiv:2605.18795.
    Differs: each layer has a draw of its own, which other layers do not change.
    """
    rows = rows_of_blocks(profile, heat(profile, options.criterion))
    chosen = [
        drawn(len(row), experts_kept(row, options.hot), layer_seed(settings.seed, block.layer))
        for block, row in zip(profile.layout.blocks, rows, strict=True)
    ]
    return settings.at(sites_with_experts(profile, options, chosen))


def place_cold(profile: Profile, options: HotOptions, settings: AdapterSettings) -> list[Placement]:
    """Keep the least routed experts of each layer, as many as `hellora` would keep.

    Args:
        profile: Counts and mass on the target data.
        options: As for `hellora`.
        settings: Rank and scale.

    Returns:
        One plain LoRA a site.

    Raises:
        ConfigurationError: the model is dense, or `hot` does not fit it.
        ProfileError: a layer has no routed token.

    Source: the opposite of HELLoRA, arXiv:2605.18795.
    Differs: nothing.
    """
    rows = rows_of_blocks(profile, heat(profile, options.criterion))
    chosen = [coldest(row, experts_kept(row, options.hot)) for row in rows]
    return settings.at(sites_with_experts(profile, options, chosen))


RANDOM = Method(
    name="random",
    summary="control: as hellora, with experts drawn at random",
    source="control at hellora's budget",
    options=HotOptions,
    place=place_random,
)
COLD = Method(
    name="cold",
    summary="control: as hellora, with the least routed experts",
    source="control at hellora's budget",
    options=HotOptions,
    place=place_cold,
)
