"""`apply`: put a plan's adapters on a model, all of them or none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor

from apportion.counting import count
from apportion.discovery import find_sites, walk_modules
from apportion.errors import ConfigurationError, PlanMismatchError
from apportion.peft.config import ApportionConfig
from apportion.peft.masks import random_mask
from apportion.peft.start import drawn_checksum, start_factors
from apportion.records.mask import Mask, b_shapes
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
    model: nn.Module,
    plan: Plan,
    *,
    adapter_name: str = "default",
    seed: int = 0,
    dropout: float = 0.0,
    mask: Mask | None = None,
    dense_b: bool = False,
    store_a: bool = False,
    on_top_of: dict[str, str] | None = None,
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
        mask: For a sparse plan, the entries of B that train; drawn at random from the seed where not given, which is
            the control for a mask that training made (`apportion train` makes one).
        dense_b: For a sparse plan, train all of B on the frozen A, to find out which entries to keep.
        store_a: For a sparse plan, keep the frozen A in checkpoints rather than draw it again from the seed.
        on_top_of: As `merge_below` gives it: the adapter that the model already contains.

    Returns:
        A `PeftModel`, with the base frozen and a `receipt` attribute that accounts for every planned site.

    Raises:
        PlanMismatchError: the plan was made for another architecture, or names sites that the model lacks.
        ConfigurationError: the adapter's name is taken, the dropout is no share, the mask does not fit the plan, or the
            plan needs something that cannot be built.

    Source: LoRA, arXiv:2106.09685; placement as HELLoRA, arXiv:2605.18795; frozen A and sparse B as LoRI,
        arXiv:2504.07448.
    Differs: on a planned expert, gate and up have factors of their own although their weights are stored as one.
    """
    layout = find_sites(model)
    _check(model, layout, plan, adapter_name, dropout)
    if plan.is_sparse and not dense_b and mask is None:
        mask = random_mask(plan.placements, layout.by_name, seed)
    checksum = drawn_checksum(plan, layout.by_name, seed)
    _check_sparse(plan, layout, mask, checksum, dense_b=dense_b, store_a=store_a)
    config = ApportionConfig(
        plan=plan.as_dict(),
        init_seed=seed,
        r=plan.rank,
        lora_alpha=plan.alpha,
        lora_dropout=dropout,
        dense_b=dense_b,
        store_a=store_a,
        a_checksum=checksum,
        on_top_of=on_top_of,
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    config.mask = mask
    with torch.random.fork_rng(devices=[]):
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
            peft_model = model
        else:
            peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    start_factors(peft_model, adapter_name, seed, frozen=False)
    peft_model.receipt = _receipt(peft_model, layout, plan, adapter_name, dense_b=dense_b)
    return peft_model


def _check(model: nn.Module, layout: Layout, plan: Plan, adapter_name: str, dropout: float) -> None:
    """Refuse, before anything changes, what could not be attached whole."""
    if adapter_name in getattr(model, "peft_config", {}):
        raise ConfigurationError(
            f"the model has an adapter {adapter_name!r} already.", fix="choose another adapter_name"
        )
    if "." in adapter_name or not adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ConfigurationError(
            f"{adapter_name!r} cannot be the name of an adapter: it is empty, has a dot, or is taken by PyTorch.",
            fix="choose another name, without dots",
        )
    if not 0 <= dropout < 1:
        raise ConfigurationError(f"dropout={dropout} is no share.", fix="give a number from 0 to below 1")
    check_architecture(layout, plan)
    for placement in plan.placements:
        routed = placement.is_routed and layout.by_name[placement.site].storage != "linear"
        if routed:
            raise ConfigurationError(f"the adapter planned for {placement.site} cannot be built by this version.")
    planned = {path for placement in plan.placements for path in (placement.site, placement.name.module)}
    for path, _, module in walk_modules(model):
        if path in planned:
            _check_weights(path, module)


def _check_weights(path: str, module: nn.Module) -> None:
    """Refuse a module whose weights are spread over processes or not in memory."""
    reason = None
    if getattr(module, "_is_expert_parallel", False):
        reason = "are split over processes (expert parallelism)"
    elif any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        reason = "are sharded over processes"
    elif getattr(getattr(module, "_hf_hook", None), "offload", False):
        reason = "are offloaded and not in memory"
    if reason:
        raise ConfigurationError(
            f"no adapter can be attached to a model whose weights {reason}: its factors would not be trained right.",
            place=path,
            fix="attach the adapters before the model is sharded or offloaded",
        )


def check_architecture(layout: Layout, plan: Plan) -> None:
    """Refuse a plan for another model.

    Args:
        layout: The model's sites.
        plan: The plan.

    Raises:
        PlanMismatchError: names or shapes of the model's parameters are not those that the plan was made for.
    """
    missing = [placement.site for placement in plan.placements if placement.site not in layout.by_name]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise PlanMismatchError(
            f"the plan asks for {len(missing)} adapters that this model has no place for.",
            details={"first": f"{missing[0]}{more}", "model": layout.describe(), "plan": f"made for {plan.model}"},
            fix="profile this model, or apply to the model that the plan was made for",
        )
    if plan.fingerprint != layout.fingerprint:
        raise PlanMismatchError(
            "the plan was made for another architecture: names or shapes of the parameters differ.",
            details={
                "model": f"{layout.describe()}, fingerprint {layout.fingerprint[:12]}",
                "plan": f"made for {plan.model}, fingerprint {plan.fingerprint[:12]}",
            },
            fix="profile this model, or apply to the model that the plan was made for",
        )


def _check_sparse(
    plan: Plan, layout: Layout, mask: Mask | None, checksum: str | None, *, dense_b: bool, store_a: bool
) -> None:
    """Refuse what only sparse plans have, and a mask for other sites, other shapes, other numbers or another A."""
    asked = {"mask": mask is not None, "dense_b": dense_b, "store_a": store_a}
    if not plan.is_sparse and any(asked.values()):
        name = next(name for name, given in asked.items() if given)
        raise ConfigurationError(f"{name} was given, and the plan is not sparse.", fix="leave it out")
    if dense_b and mask is not None:
        raise ConfigurationError("mask and dense_b were both given.", fix="give one: all of B trains, or a part")
    if mask is None:
        return
    shapes = b_shapes(plan.placements, layout.by_name)
    wrong = [site for site, shape in shapes.items() if mask.shapes.get(site) != shape]
    wrong += [site for site in mask.shapes if site not in shapes]
    if wrong:
        raise ConfigurationError(
            "the mask is for other sites or shapes than the plan.",
            details={"first": f"{wrong[0]}: mask {mask.shapes.get(wrong[0])}, plan {shapes.get(wrong[0])}"},
            fix="give the mask of a plan with the same sites and ranks",
        )
    kept = count(plan.placements, layout.by_name).indices
    if mask.num_kept != kept:
        raise ConfigurationError(
            f"the mask keeps {mask.num_kept} entries, the plan {kept}.", fix="give a mask of the plan's sparsity"
        )
    if mask.a_checksum not in (None, checksum):
        raise ConfigurationError(
            "the mask was made with another A than this seed draws.",
            fix="use the mask's own seed, or extract a mask with this one",
        )


def check_attachable(model: nn.Module, plan: Plan, *, mask: Mask | None = None, seed: int = 0) -> None:
    """Refuse, before anything is written, what `apply` would refuse.

    Args:
        model: The model.
        plan: The plan.
        mask: The mask, if there is one.
        seed: The seed of the factors' start.

    Raises:
        PlanMismatchError: the plan is for another model.
        ConfigurationError: the mask does not fit.
    """
    layout = find_sites(model)
    _check(model, layout, plan, "default", 0.0)
    checksum = drawn_checksum(plan, layout.by_name, seed) if mask is not None else None
    _check_sparse(plan, layout, mask, checksum, dense_b=False, store_a=False)


def adapter_parameters(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """Find an adapter's parameters in the layers that hold them, whatever the adapter is called.

    Args:
        model: A model with adapters.
        adapter_name: The adapter.

    Returns:
        Its parameters, trained or not, in model order.
    """
    found = []
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for holder in ("lora_A", "lora_B", "lora_router"):
                part = getattr(module, holder, {})
                found += list(part[adapter_name].parameters()) if adapter_name in part else []
    return found


def _receipt(model: PeftModel, layout: Layout, plan: Plan, adapter_name: str, *, dense_b: bool) -> Receipt:
    """Account for every planned site on the model itself."""
    sites = layout.by_name
    expected = count(plan.placements, sites, dense=dense_b).trained
    counted = sum(parameter.numel() for parameter in adapter_parameters(model, adapter_name))
    if counted != expected:
        raise RuntimeError(f"{counted} parameters were attached, {expected} planned: this is a bug")
    return Receipt(
        adapter_name=adapter_name,
        sites_by_kind=dict(Counter(sites[placement.site].kind for placement in plan.placements)),
        trainable_parameters=counted,
        frozen_parameters=layout.base_parameters,
    )
