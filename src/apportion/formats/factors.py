"""A saved adapter's factors, site by site, read from its folder; no model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apportion.accounting import empty_model, layout_of
from apportion.adapters.factors import scattered
from apportion.errors import AdapterError, ConfigurationError
from apportion.peft.attach import check_architecture
from apportion.peft.config import ApportionConfig
from apportion.peft.load import read_adapter_config, read_plan, read_state
from apportion.peft.start import draw, drawn_checksum
from apportion.peft.state import PREFIX
from apportion.records.placement import Placement
from apportion.records.plan import Plan
from apportion.records.site import Kind, Layout, Site

# R summed rank of a site's LoRA experts, E of them; I and O the site's input and output width.


class SiteFactors(NamedTuple):
    """What an adapter holds at one site.

    Args:
        site: The site.
        placement: The plan's entry, with the scale alpha / rank.
        a_RI: A, as trained or as drawn from the seed.
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
        base: The base model, by a name that `apportion.accounting.layout_of` takes.
        trust_remote_code: Whether Python code that comes with the base model may run.
        left_out: Kinds of site that are left out.
    """

    folder: Path
    config: ApportionConfig
    plan: Plan
    layout: Layout
    state: dict[str, Tensor]
    base: str
    trust_remote_code: bool = False
    left_out: frozenset[Kind] = frozenset()

    @property
    def placements(self) -> tuple[Placement, ...]:
        """The plan's placements, without those that are left out."""
        by_name = self.layout.by_name
        return tuple(each for each in self.plan.placements if by_name[each.site].kind not in self.left_out)

    def empty_base(self) -> PreTrainedModel:
        """Build the base model without its weights."""
        return empty_model(self.base, trust_remote_code=self.trust_remote_code)

    def factors(self) -> Iterator[SiteFactors]:
        """Go through the sites in the plan's order.

        Yields:
            The factors, on the CPU, in the type in which they are stored.
        """
        for placement in self.placements:
            site = self.layout.by_name[placement.site]
            router = self.state.get(f"{site.name}.lora_router.weight")
            yield SiteFactors(site, placement, self._a(site, placement), self._b(site, placement), router)

    def _a(self, site: Site, placement: Placement) -> Tensor:
        """Give A, drawn again where the file has none."""
        stored = self.state.get(f"{site.name}.lora_A.weight")
        if stored is not None:
            return stored
        a_RI = torch.empty(placement.total_rank, site.in_features)
        draw(a_RI, site.name, self.config.init_seed)
        return a_RI

    def _b(self, site: Site, placement: Placement) -> Tensor:
        """Give B, scattered where the file has kept entries alone."""
        stored = self.state.get(f"{site.name}.lora_B.weight")
        if stored is not None:
            return stored
        values, indices = (self.state[f"{site.name}.lora_B.{part}"] for part in ("values", "indices"))
        return scattered(values, indices, (site.out_features, placement.total_rank))


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
    plan = read_plan(config, path)
    name = model or plan.base_model
    if name is None:
        raise ConfigurationError(f"the adapter in {path} does not say which model it is for.", fix="give --model")
    layout = layout_of(name, plan.fingerprint, trust_remote_code=trust_remote_code)
    check_architecture(layout, plan)
    state = {key.removeprefix(PREFIX): value for key, value in read_state(path, config, plan, layout).items()}
    _check_drawn(path, config, plan, layout)
    return SavedAdapter(Path(path), config, plan, layout, state, os.fspath(name), trust_remote_code)


def _check_drawn(path: str | os.PathLike[str], config: ApportionConfig, plan: Plan, layout: Layout) -> None:
    """Refuse an adapter whose frozen A this version of torch draws otherwise."""
    expected = config.a_checksum
    if expected and not config.store_a and drawn_checksum(plan, layout.by_name, config.init_seed) != expected:
        raise AdapterError(
            f"the frozen A of the adapter in {os.fspath(path)} is not stored, and cannot be drawn again as it was.",
            fix="save it with store_a, using the version of torch that trained it",
        )
