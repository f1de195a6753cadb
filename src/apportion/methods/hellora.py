"""HELLoRA: adapters on each layer's hottest experts, on attention and on the router."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apportion.methods.base import AdapterSettings, Method
from apportion.methods.hot import experts_kept, heat, hottest, rows_of_blocks, sites_with_experts
from apportion.records.options import HotOptions
from apportion.records.placement import Placement

if TYPE_CHECKING:
    from apportion.records.profile import Profile


def place_hellora(profile: Profile, options: HotOptions, settings: AdapterSettings) -> list[Placement]:
    """Adapt the most routed experts of each layer, and all other targeted sites.

    Args:
        profile: Counts and mass on the target data; tasks are summed.
        options: Number of experts and ranking criterion.
        settings: Rank and scale.

    Returns:
        One LoRA per site.

    Raises:
        ConfigurationError: the model is dense, or `hot` does not fit it.
        ProfileError: a layer has no routed token.

    Source: HELLoRA, arXiv:2605.18795, layer-wise hot-expert selection.
    Differs: ties go to the lower expert id; percentages, coverage and ranking by mass are additions.
    """
    rows = rows_of_blocks(profile, heat(profile, options.criterion))
    chosen = [hottest(row, experts_kept(row, options.hot)) for row in rows]
    return settings.at(sites_with_experts(profile, options, chosen))


HELLORA = Method(
    name="hellora",
    summary="LoRA on each layer's most routed experts, on attention and on the router",
    source="HELLoRA, arXiv:2605.18795",
    options=HotOptions,
    place=place_hellora,
)
