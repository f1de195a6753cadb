"""`apply`: attach a plan's adapters to a model, all of them or none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from apportion.counting import count
from apportion.discovery import find_sites, walk_modules
from apportion.errors import ConfigurationError, PlanError, PlanMismatchError
from apportion.peft.bound import BoundPlan, binding
from apportion.peft.config import ApportionConfig
from apportion.peft.hosted import hosted
from apportion.peft.masks import random_mask
from apportion.peft.names import check_told_apart
from apportion.peft.start import draw_frozen
from apportion.peft.unsupported import Kinds, refuse_elsewhere, refuse_unsupported
from apportion.records.mask import Mask, b_shapes
from apportion.records.plan import Plan
from apportion.records.shapes.low_rank import LowRank
from apportion.records.site import Layout


@dataclass(frozen=True)
class Receipt:
    """What `apply` did.

    Args:
        adapter_name: The adapter's name.
        sites_by_kind: Number of adapted sites of each kind.
        trainable_parameters: Trainable parameters of the adapter, counted on the model.
        frozen_parameters: All other parameters.
    """

    adapter_name: str
    sites_by_kind: dict[str, int]
    trainable_parameters: int
    frozen_parameters: int

    def __str__(self) -> str:
        """Return a one-line summary."""
        sites = ", ".join(f"{count} {kind}" for kind, count in self.sites_by_kind.items())
        total = self.trainable_parameters + self.frozen_parameters
        trained = (
            f"{self.trainable_parameters:,} of {total:,} parameters train ({self.trainable_parameters / total:.2%})"
        )
        return f"adapter {self.adapter_name!r}: {sites} sites; {trained}"


@dataclass(frozen=True)
class PhaseOptions:
    """Options of a training phase that the adapter's configuration records.

    Args:
        dense_b: For a sparse plan, train all of B on the frozen A, to find out which entries to keep.
        store_a: For a sparse plan, write the frozen A to checkpoints instead of drawing it again from the seed.
        on_top_of: The adapter that is already merged into the model, as `merge_below` returns it.
    """

    dense_b: bool = False
    store_a: bool = False
    on_top_of: dict[str, str] | None = None


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    adapter_name: str = "default",
    seed: int = 0,
    dropout: float = 0.0,
    mask: Mask | None = None,
    phase: PhaseOptions | None = None,
) -> PeftModel:
    """Attach exactly the adapters that a plan names. If that fails, the model is unchanged.

    The initial values of a factor depend only on the seed and its site's name. Plans that share a site give it the same
    initial values, on every process and in any order.

    Args:
        model: The model that the plan was made for. A `PeftModel` with other adapters of this package gets one more,
            which is inactive until `set_adapter`.
        plan: The plan.
        adapter_name: Name of the new adapter.
        seed: Seed of the initial values.
        dropout: Dropout probability of the adapters' inputs in training. Routers have no dropout.
        mask: For a sparse plan, the entries of B to train. By default they are drawn at random from the seed, which is
            the control for a mask that was extracted from training (see `apportion train`).
        phase: Options that multi-phase training sets.

    Returns:
        A `PeftModel` with a frozen base and a `receipt` attribute that accounts for every planned site.

    Raises:
        PlanMismatchError: the plan was made for another architecture, or names sites that the model lacks.
        ConfigurationError: the adapter's name is taken or invalid, the dropout is not in [0, 1), the mask does not fit
            the plan, or a planned adapter cannot be built.

    Source: LoRA, arXiv:2106.09685; placement as HELLoRA, arXiv:2605.18795; frozen A and sparse B as LoRI,
        arXiv:2504.07448.
    Differs: on a planned expert, gate and up have separate factors although their weights are stored as one tensor.
    """
    phase = phase or PhaseOptions()
    layout = find_sites(model)
    _check(model, layout, plan, adapter_name, dropout)
    if plan.is_sparse and not phase.dense_b and mask is None:
        mask = random_mask(plan.placements, layout.by_name, seed)
    frozen = draw_frozen(plan, layout.by_name, seed)
    checksum = None if frozen is None else frozen.checksum
    _check_sparse(plan, layout, mask, checksum, phase)
    config = ApportionConfig(
        plan=plan,
        init_seed=seed,
        r=plan.rank,
        lora_alpha=plan.alpha,
        lora_dropout=dropout,
        dense_b=phase.dense_b,
        store_a=phase.store_a,
        a_checksum=checksum,
        on_top_of=phase.on_top_of,
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    bound = BoundPlan(plan, layout, frozen, None if mask is None else mask.indices)
    with torch.random.fork_rng(devices=[]), binding(bound):
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
            peft_model = model
        else:
            peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    peft_model.receipt = receipt_of(peft_model, layout, plan, adapter_name, dense_b=phase.dense_b)
    return peft_model


def _check(model: nn.Module, layout: Layout, plan: Plan, adapter_name: str, dropout: float) -> None:
    """Raise an error, before anything changes, if a part of the plan cannot be attached."""
    if adapter_name in getattr(model, "peft_config", {}):
        raise ConfigurationError(
            f"the model already has an adapter {adapter_name!r}.", fix="choose another adapter_name"
        )
    if "." in adapter_name or not adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ConfigurationError(
            f"{adapter_name!r} is not a valid adapter name: it is empty, contains a dot, or is reserved by PyTorch.",
            fix="choose another name, without dots",
        )
    check_told_apart(model, adapter_name)
    if not 0 <= dropout < 1:
        raise ConfigurationError(f"dropout={dropout} is out of range.", fix="give a number in [0, 1)")
    check_architecture(layout, plan)
    for placement in plan.placements:
        site = layout.by_name[placement.site]
        if placement.shape.lora_rank is None and site.storage != "linear":  # its gates depend on the input
            raise ConfigurationError(f"the adapter planned for {placement.site} cannot be built by this version.")
        try:
            placement.shape.check(site.in_features, site.out_features)
        except PlanError as error:
            raise error.at(placement.site) from error
    planned = {path for placement in plan.placements for path in (placement.site, placement.name.module)}
    by_peft = {placement.site for placement in plan.placements if isinstance(placement.shape, LowRank)}
    known: Kinds = set()
    for path, _, module in walk_modules(model):
        if path in planned:
            refuse_elsewhere(path, module)
        found = layout.by_name.get(path)
        if found is not None and (path in by_peft or (path in planned and found.storage == "weight")):
            refuse_unsupported(path, module, found.storage, known)


def check_architecture(layout: Layout, plan: Plan) -> None:
    """Check that a plan was made for this model.

    Args:
        layout: The model's sites.
        plan: The plan.

    Raises:
        PlanMismatchError: the names or shapes of the model's parameters differ from those of the plan's model.
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


def _check_sparse(plan: Plan, layout: Layout, mask: Mask | None, checksum: str | None, phase: PhaseOptions) -> None:
    """Raise an error if sparse-only options or the mask do not fit the plan."""
    sparse_only = {"mask": mask is not None, "dense_b": phase.dense_b, "store_a": phase.store_a}
    if not plan.is_sparse and any(sparse_only.values()):
        name = next(name for name, given in sparse_only.items() if given)
        raise ConfigurationError(f"{name} was given, but the plan is not sparse.", fix="leave it out")
    if phase.dense_b and mask is not None:
        raise ConfigurationError("mask and dense_b were both given.", fix="give only one of them")
    if mask is None:
        return
    shapes = b_shapes(plan.placements, layout.by_name)
    wrong = [site for site, shape in shapes.items() if mask.shapes.get(site) != shape]
    wrong += [site for site in mask.shapes if site not in shapes]
    if wrong:
        raise ConfigurationError(
            "the mask has other sites or shapes than the plan.",
            details={"first": f"{wrong[0]}: mask {mask.shapes.get(wrong[0])}, plan {shapes.get(wrong[0])}"},
            fix="use a mask of a plan with the same sites and ranks",
        )
    num_planned = count(plan.placements, layout.by_name).indices
    if mask.num_kept != num_planned:
        raise ConfigurationError(
            f"the mask keeps {mask.num_kept} entries, the plan {num_planned}.", fix="use a mask of the plan's sparsity"
        )
    if mask.a_checksum not in (None, checksum):
        raise ConfigurationError(
            "the mask was extracted with a different A than this seed draws.",
            fix="use the seed that the mask was extracted with, or extract a mask with this seed",
        )


def check_attachable(model: nn.Module, plan: Plan, *, mask: Mask | None = None, seed: int = 0) -> None:
    """Raise the errors that `apply` would raise, before anything is written.

    Args:
        model: The model.
        plan: The plan.
        mask: The mask, if any.
        seed: Seed of the factors' initial values.

    Raises:
        PlanMismatchError: the plan is for another model.
        ConfigurationError: the mask does not fit.
    """
    layout = find_sites(model)
    _check(model, layout, plan, "default", 0.0)
    frozen = draw_frozen(plan, layout.by_name, seed) if mask is not None else None
    _check_sparse(plan, layout, mask, None if frozen is None else frozen.checksum, PhaseOptions())


def adapter_parameters(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """List an adapter's parameters, found in the layers that hold them rather than by name.

    Args:
        model: A model with adapters.
        adapter_name: The adapter.

    Returns:
        Its parameters, trainable or frozen, in model order.
    """
    return [parameter for _, adapter in hosted(model, adapter_name) for parameter in adapter.parameters()]


def receipt_of(model: PeftModel, layout: Layout, plan: Plan, adapter_name: str, *, dense_b: bool = False) -> Receipt:
    """Account for every planned site on the model itself.

    Args:
        model: The model with the adapter.
        layout: The model's sites.
        plan: The adapter's plan.
        adapter_name: The adapter.
        dense_b: Whether sparse placements train all of B.

    Returns:
        The receipt.

    Raises:
        RuntimeError: the adapter has another number of parameters than the plan counts.
    """
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
