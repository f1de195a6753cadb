"""`--router merge`: a copy of the base model with the routers' part of an adapter added, for engines that ignore it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from apportion.errors import ConfigurationError, ModelLoadError
from apportion.formats.factors import SavedAdapter
from apportion.formats.pairs import folded
from apportion.formats.support import check_foldable
from apportion.linear_forms import is_quantised
from apportion.loading import DTYPES, load_model
from apportion.records.site import KINDS

BASE_FOLDER = "base"


def without_routers(adapter: SavedAdapter) -> SavedAdapter:
    """Leave the routers out of an adapter.

    Args:
        adapter: The adapter.

    Returns:
        The rest of it.

    Raises:
        ConfigurationError: it has no routers, or nothing else.
    """
    check_foldable(adapter.placements)
    rest = replace(adapter, left_out=frozenset({"router"}))
    if len(rest.placements) == len(adapter.placements):
        raise ConfigurationError("the adapter has no routers to merge.", fix="leave --router merge out")
    if not rest.placements:
        raise ConfigurationError("the adapter has nothing besides routers.", fix="merge it (apportion merge)")
    return rest


def write_base(adapter: SavedAdapter, folder: Path) -> None:
    """Write a copy of the base model with the routers' products added, in the base's own type.

    Args:
        adapter: The adapter, routers included.
        folder: The output folder.

    Raises:
        ConfigurationError: a router's weight is quantised.
        ModelLoadError: the base's weights cannot be read.
    """
    own = adapter.empty_base().config.dtype
    dtype = next((name for name, each in DTYPES.items() if each == own), "float32")
    try:
        model, tokenizer = load_model(adapter.base, dtype, trust_remote_code=adapter.trust_remote_code)
    except ModelLoadError as error:
        raise error.adding(fix="give the base model with --model: --router merge needs its weights") from error
    routers = replace(adapter, left_out=frozenset(kind for kind in KINDS if kind != "router"))
    with torch.no_grad():
        for site, a_RI, b_OR in folded(routers, torch.float32):
            module = model.get_submodule(site.name)
            if is_quantised(module) or not module.weight.is_floating_point():
                raise ConfigurationError(
                    f"the weight of {site.name} is quantised, so nothing can be added to it.",
                    fix="give the base model before quantisation with --model",
                )
            module.weight.copy_(module.weight.float() + (b_OR @ a_RI).to(module.weight.device))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
