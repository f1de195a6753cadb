"""MELoRA: block-diagonal LoRA on every target."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from apportion.errors import ConfigurationError
from apportion.methods.base import AdapterSettings, Method
from apportion.methods.targets import targeted_sites
from apportion.records.options import MethodOptions
from apportion.records.placement import Placement
from apportion.records.shapes.blocks import Blocks

if TYPE_CHECKING:
    from apportion.records.profile import Profile


class MeloraOptions(MethodOptions):
    """Options of `melora`."""

    panel: ClassVar[str] = MethodOptions.panel

    blocks: int = Field(2, ge=1, description="Blocks on the diagonal; they divide both widths of every matrix.")


def place_melora(profile: Profile, options: MeloraOptions, settings: AdapterSettings) -> list[Placement]:
    """Adapt every targeted site with small LoRAs on slices of its input and output.

    Args:
        profile: Only its layout is used.
        options: Targets; the number of blocks.
        settings: Rank and scale of each block.

    Returns:
        One adapter per site.

    Raises:
        ConfigurationError: the model has no site for a target, or a sparsity was given.

    Source: MELoRA, arXiv:2402.17263.
    Differs: all blocks of a matrix have one rank; widths that the number of blocks does not divide are refused, while
        the release cuts them.
    """
    if settings.sparsity:
        raise ConfigurationError("melora trains all of its blocks.", found=f"sparsity={settings.sparsity}")
    plain = settings.at(targeted_sites(options, profile.layout))
    return [replace(one, shape=Blocks(one.rank, one.alpha, options.blocks)) for one in plain]


MELORA = Method(
    name="melora",
    summary="block-diagonal LoRA: several small LoRAs per matrix, each on its slice of input and output",
    source="MELoRA, arXiv:2402.17263",
    options=MeloraOptions,
    place=place_melora,
)
