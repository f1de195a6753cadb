"""Controls: `random` and `cold`, which adapt as many experts per layer as `hellora`, chosen differently."""

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
    """Choose as many experts per layer as `hellora` would keep, at random.

    Args:
        profile: Profile of the model. Its counts are used only if `hot` is a coverage.
        options: The same options as `hellora`.
        settings: Rank, scale and random seed.

    Returns:
        One LoRA per site.

    Raises:
        ConfigurationError: the model is dense, or `hot` does not fit it.
        ProfileError: a layer has no routed token.

    Source: the usual control of placement studies; HELLoRA, arXiv:2605.18795.
    Differs: each layer is sampled independently.
    """
    rows = rows_of_blocks(profile, heat(profile, options.criterion))
    chosen = [
        drawn(len(row), experts_kept(row, options.hot), layer_seed(settings.seed, block.layer))
        for block, row in zip(profile.layout.blocks, rows, strict=True)
    ]
    return settings.at(sites_with_experts(profile, options, chosen))


def place_cold(profile: Profile, options: HotOptions, settings: AdapterSettings) -> list[Placement]:
    """Choose the least routed experts of each layer, as many as `hellora` would keep.

    Args:
        profile: Counts and mass on the target data.
        options: The same options as `hellora`.
        settings: Rank and scale.

    Returns:
        One LoRA per site.

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
    summary="control: hellora with random experts",
    source="control at hellora's budget",
    options=HotOptions,
    place=place_random,
)
COLD = Method(
    name="cold",
    summary="control: hellora with the least routed experts",
    source="control at hellora's budget",
    options=HotOptions,
    place=place_cold,
)
