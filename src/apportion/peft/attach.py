"""`apply` and `load`: put a plan's adapters on a model, all of them or none."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from apportion.adapters.experts import ExpertLora
from apportion.adapters.routed import RoutedLora
from apportion.adapters.weight import WeightLora
from apportion.discovery import find_sites, walk_modules
from apportion.errors import ConfigurationError, PlanMismatchError
from apportion.peft.config import ApportionConfig
from apportion.records.plan import Plan
from apportion.records.site import Layout


@dataclass(frozen=True)
class Receipt:
    """What `apply` did.

    Args:
        adapter_name: The adapter's name.
        sites_by_kind: Number of adapted sites of each kind.
        trainable_parameters: Parameters that the adapter trains, counted on the model.
        frozen_parameters: All other parameters.
    """

    adapter_name: str
    sites_by_kind: dict[str, int]
    trainable_parameters: int
    frozen_parameters: int

    def __str__(self) -> str:
        """Say it in one line."""
        sites = ", ".join(f"{count} {kind}" for kind, count in self.sites_by_kind.items())
        total = self.trainable_parameters + self.frozen_parameters
        trained = (
            f"{self.trainable_parameters:,} of {total:,} parameters train ({self.trainable_parameters / total:.2%})"
        )
        return f"adapter {self.adapter_name!r}: {sites} sites; {trained}"


def apply(
    model: nn.Module, plan: Plan, *, adapter_name: str = "default", seed: int = 0, dropout: float = 0.0
) -> PeftModel:
    """Attach exactly the adapters that a plan names, or change nothing and say why.

    Every factor's random start depends on the seed and on its site's name alone: plans that share a site start it from
    the same values, on every rank and in every order.

    Args:
        model: The model that the plan is for; or a `PeftModel` that holds other adapters of this package, which then
            gets one more, inactive until `set_adapter`.
        plan: The plan.
        adapter_name: Name of the new adapter.
        seed: Seed of the random start.
        dropout: Share of the adapters' inputs dropped in training; routers are left out of it.

    Returns:
        A `PeftModel`, with the base frozen and a `receipt` attribute that accounts for every planned site.

    Raises:
        PlanMismatchError: the plan was made for another architecture, or names sites that the model lacks.
        ConfigurationError: the adapter's name is taken, the dropout is no share, or the plan needs something that this
            version cannot build.

    Source: LoRA, arXiv:2106.09685; placement as HELLoRA, arXiv:2605.18795.
    Differs: on a planned expert, gate and up have factors of their own although their weights are stored as one.
    """
    layout = find_sites(model)
    _check(model, layout, plan, adapter_name, dropout)
    config = ApportionConfig(
        plan=plan.as_dict(),
        init_seed=seed,
        r=plan.rank,
        lora_alpha=plan.alpha,
        lora_dropout=dropout,
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    with torch.random.fork_rng(devices=[]):
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
            peft_model = model
        else:
            peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    _start_factors(peft_model, adapter_name, seed)
    peft_model.receipt = _receipt(peft_model, layout, plan, adapter_name)
    return peft_model


def load(model: nn.Module, path: str | os.PathLike[str], **kwargs: Any) -> PeftModel:
    """Load a saved adapter: `PeftModel.from_pretrained` with this package's method registered.

    Args:
        model: The base model.
        path: The folder that `save_pretrained` wrote.
        **kwargs: As `PeftModel.from_pretrained` takes them, ``is_trainable`` for one.

    Returns:
        The model with the adapter.

    Raises:
        PlanMismatchError: the adapter belongs to another architecture.
        ConfigurationError: there is no adapter in the folder.
    """
    _check_architecture(find_sites(model), read_adapter_plan(path))
    return PeftModel.from_pretrained(model, os.fspath(path), **kwargs)


def read_adapter_plan(path: str | os.PathLike[str]) -> Plan:
    """Read the plan that a saved adapter was made from.

    Args:
        path: The adapter's folder.

    Returns:
        The plan.

    Raises:
        ConfigurationError: there is no adapter of this package in the folder.
        PlanError: the plan in the folder was changed.
    """
    folder = os.fspath(path)
    if not os.path.isfile(os.path.join(folder, "adapter_config.json")):
        raise ConfigurationError(f"there is no adapter in {folder}.\n  fix:  give a folder with adapter_config.json")
    config = ApportionConfig.from_pretrained(folder)
    if not isinstance(config, ApportionConfig):
        raise ConfigurationError(
            f"the adapter in {folder} was not made by apportion.\n  fix:  load it with peft itself"
        )
    return config.read_plan()


def _check(model: nn.Module, layout: Layout, plan: Plan, adapter_name: str, dropout: float) -> None:
    """Refuse, before anything changes, what could not be attached whole."""
    if adapter_name in getattr(model, "peft_config", {}):
        raise ConfigurationError(
            f"the model has an adapter {adapter_name!r} already.\n  fix:  choose another adapter_name"
        )
    if "." in adapter_name or not adapter_name:
        raise ConfigurationError(f"{adapter_name!r} is no name for an adapter.\n  fix:  choose a name without dots")
    if not 0 <= dropout < 1:
        raise ConfigurationError(f"dropout={dropout} is no share.\n  fix:  give a number from 0 to below 1")
    _check_architecture(layout, plan)
    for placement in plan.placements:
        routed = placement.is_routed and layout.by_name[placement.site].storage != "linear"
        if routed or placement.sparsity:
            raise ConfigurationError(f"the adapter planned for {placement.site} cannot be built by this version.")
    experts = {path: own for path, _, own in walk_modules(model)}
    for block in layout.blocks:
        if getattr(experts[block.name], "_is_expert_parallel", False):
            raise ConfigurationError(
                f"{block.name} is split over processes (expert parallelism), which is not supported."
            )


def _check_architecture(layout: Layout, plan: Plan) -> None:
    """Refuse a plan for another model."""
    missing = [placement.site for placement in plan.placements if placement.site not in layout.by_name]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise PlanMismatchError(
            f"the plan asks for {len(missing)} adapters that this model has no place for.\n"
            f"  first:  {missing[0]}{more}\n  model:  {layout.describe()}\n  plan:   made for {plan.model}\n"
            "  fix:    profile this model, or apply to the model that the plan was made for"
        )
    if plan.fingerprint != layout.fingerprint:
        raise PlanMismatchError(
            "the plan was made for another architecture: names or shapes of the parameters differ.\n"
            f"  model:  {layout.describe()}, fingerprint {layout.fingerprint[:12]}\n"
            f"  plan:   made for {plan.model}, fingerprint {plan.fingerprint[:12]}\n"
            "  fix:    profile this model, or apply to the model that the plan was made for"
        )


@torch.no_grad()
def _start_factors(model: PeftModel, adapter_name: str, seed: int) -> None:
    """Draw every A and every router from the seed and its site's name, Kaiming-uniform as PEFT does; B is zero."""
    for path, called, own in walk_modules(model):
        if called is own or adapter_name not in getattr(called, "lora_A", {}):
            continue
        if isinstance(called, ExpertLora):
            for name, factors in called.factors[adapter_name].items():
                parts = torch.split(called.lora_A[adapter_name][name], list(factors.ranks))
                for expert, a_RI in zip(factors.experts, parts, strict=True):
                    _draw(a_RI, f"{path}.{expert}.{name}", seed)
        elif isinstance(called, (LoraLayer, RoutedLora, WeightLora)):
            weight: Any = called.lora_A[adapter_name].weight
            _draw(weight, path, seed)
            if isinstance(called, RoutedLora) and adapter_name in called.lora_router:
                _draw(called.lora_router[adapter_name].weight, f"{path}.lora_router", seed)


def _draw(a_RI: Tensor, site: str, seed: int) -> None:
    """Fill one A from its own generator; the bound 1/sqrt(in) is that of PEFT's initialisation."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{site}".encode()).digest()[:7]))
    bound = 1 / math.sqrt(a_RI.shape[1])
    if a_RI.device.type != "meta":
        a_RI.copy_(torch.empty(a_RI.shape).uniform_(-bound, bound, generator=generator))


def _receipt(model: PeftModel, layout: Layout, plan: Plan, adapter_name: str) -> Receipt:
    """Account for every planned site on the model itself."""
    sites = layout.by_name
    adapted = [parameter for name, parameter in model.named_parameters() if f".{adapter_name}." in f"{name}."]
    counted = sum(parameter.numel() for parameter in adapted)
    if counted != plan.cost.trainable_parameters:
        raise RuntimeError(
            f"{counted} parameters were attached, {plan.cost.trainable_parameters} planned: this is a bug"
        )
    return Receipt(
        adapter_name=adapter_name,
        sites_by_kind=dict(Counter(sites[placement.site].kind for placement in plan.placements)),
        trainable_parameters=counted,
        frozen_parameters=layout.base_parameters,
    )
