"""A saved adapter's factors, site by site, read from its folder; no model is loaded."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.accounting import layout_of
from apportion.adapters.shapes.base import Place, Shape
from apportion.errors import AdapterError, ConfigurationError
from apportion.peft.attach import check_architecture
from apportion.peft.config import ApportionConfig
from apportion.peft.load import read_adapter_config, read_state
from apportion.peft.shapes import make_shape
from apportion.peft.start import FrozenDraws, draw_frozen
from apportion.peft.state import PREFIX
from apportion.records.placement import Placement
from apportion.records.plan import Plan
from apportion.records.site import Layout, Site

# R summed rank of a site's LoRA experts, E of them; I and O the site's input and output width.


class SiteFactors(NamedTuple):
    """What an adapter holds at one site.

    Args:
        site: The site.
        placement: The plan's entry, with the scale alpha / rank.
        a_RI: A, as trained or as drawn from the seed, of the LoRA that equals the shape, or of all LoRA experts.
        b_OR: B, dense.
        router_EI: The router of routed LoRA experts; None for others.
    """

    site: Site
    placement: Placement
    a_RI: Tensor
    b_OR: Tensor
    router_EI: Tensor | None


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's folder, read and checked.

    Args:
        folder: The folder.
        config: Its configuration.
        plan: Its plan.
        layout: The base model's sites.
        state: Its tensors, by their names in the file without PEFT's prefix.
        frozen: The frozen A matrices that the file lacks, drawn again.
    """

    folder: Path
    config: ApportionConfig
    plan: Plan
    layout: Layout
    state: dict[str, Tensor]
    frozen: FrozenDraws | None

    def factors(self) -> Iterator[SiteFactors]:
        """Go through the sites in the plan's order.

        Yields:
            The factors, on the CPU, in the type in which they are stored.
        """
        tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in self.state.items():
            site_name, _, name = key.rpartition(".lora_")
            tensors[site_name][f"lora_{name}"] = tensor
        for placement in self.plan.placements:
            site = self.layout.by_name[placement.site]
            shape = self._shape(site, placement, tensors[site.name])
            (_, a_RI, b_OR), router = next(shape.factors()), tensors[site.name].get("lora_router.weight")
            yield SiteFactors(site, placement, a_RI, b_OR, router)

    def _shape(self, site: Site, placement: Placement, tensors: dict[str, Tensor]) -> Shape:
        """Make a site's shape, with its tensors from the file, or drawn where the file has none."""
        place = Place(site.out_features, site.in_features, torch.device("cpu"), torch.float32)
        shape = make_shape(placement.shape, place, self.config.sparse)
        shape.load_state_dict(tensors, assign=True)
        if self.frozen is not None and site.name in self.frozen.tensors and "lora_A.weight" not in tensors:
            shape.get_buffer("lora_A.weight").copy_(self.frozen.tensors[site.name])
        return shape


def read_adapter(
    path: str | os.PathLike[str], model: str | os.PathLike[str] | None = None, *, trust_remote_code: bool = False
) -> SavedAdapter:
    """Read and check an adapter's folder.

    Args:
        path: The folder.
        model: The base model, by any name that `apportion.accounting.layout_of` takes; the one that the plan names if
            not given. Only its configuration is read.
        trust_remote_code: Run Python code that comes with the base model.

    Returns:
        The adapter.

    Raises:
        ConfigurationError: there is no adapter, its base model is not known, or the configuration of that cannot be
            read.
        PlanMismatchError: the base model has another architecture.
        AdapterError: the folder is damaged, or the frozen A cannot be drawn again.
    """
    config = read_adapter_config(path)
    plan, name = config.plan, model or config.plan.base_model
    if name is None:
        raise ConfigurationError(f"the adapter in {path} does not say which model it is for.", fix="give --model")
    layout = layout_of(name, plan.fingerprint, trust_remote_code=trust_remote_code)
    check_architecture(layout, plan)
    state = {key.removeprefix(PREFIX): value for key, value in read_state(path, config, layout).items()}
    frozen = None if config.store_a else draw_frozen(plan, layout.by_name, config.init_seed)
    if frozen and config.a_checksum and frozen.checksum != config.a_checksum:
        raise AdapterError(
            f"the frozen A of the adapter in {os.fspath(path)} is not stored, and cannot be drawn again as it was.",
            fix="save it with store_a, using the version of torch that trained it",
        )
    return SavedAdapter(Path(path), config, plan, layout, state, frozen)
