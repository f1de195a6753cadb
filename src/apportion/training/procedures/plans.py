"""Plans that change in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from peft import PeftModel

from apportion.counting import count, flops_per_token
from apportion.discovery import find_sites
from apportion.errors import ConfigurationError
from apportion.methods.planning import even_profile
from apportion.peft.attach import receipt_of
from apportion.peft.load import read_adapter_plan
from apportion.records.placement import Placement
from apportion.records.plan import Plan
from apportion.records.plan_schema import in_file_order
from apportion.records.site import Layout


def with_placements(plan: Plan, placements: Iterable[Placement], layout: Layout) -> Plan:
    """Return a plan with other placements, and its cost.

    Operations per token are those of the plan, changed in proportion to those under even routing, because the profile
    is not at hand. This is exact if all ranks change by one factor, or if no expert is adapted.

    Args:
        plan: The plan.
        placements: The placements, in any order.
        layout: The model's sites.

    Returns:
        The plan. `derived_from` is unchanged.
    """
    order = {name: position for position, name in enumerate(layout.by_name)}
    placements = in_file_order(sorted(placements, key=lambda placement: order[placement.site]))
    counts, even = count(placements, layout.by_name), even_profile(layout)
    flops_ratio = flops_per_token(placements, even) / flops_per_token(plan.placements, even)
    cost = replace(
        plan.cost,
        trainable_parameters=counts.trained,
        stored_parameters=counts.stored(),
        stored_indices=counts.indices,
        frozen_parameters=counts.drawn,
        adapter_flops_per_token=plan.cost.adapter_flops_per_token * flops_ratio,
        sites_by_kind=dict(Counter(layout.by_name[placement.site].kind for placement in placements)),
    )
    return replace(plan, placements=placements, cost=cost)


def record_plan(model: PeftModel, adapter_name: str, plan: Plan, start: Plan) -> None:
    """Write the plan that describes an adapter now to its configuration, and count it on the model.

    Args:
        model: The model with the adapter.
        adapter_name: The adapter.
        plan: Its plan now.
        start: The plan that training began with. If `plan` differs, it is recorded as derived from it.
    """
    if plan.seal != start.seal:
        plan = replace(plan, derived_from=(start.seal,))
    receipt = receipt_of(model, find_sites(model), plan, adapter_name)
    model.peft_config[adapter_name].plan = plan
    model.receipt = receipt


def plan_to_resume(checkpoint: Path, start: Plan) -> Plan:
    """Return the plan that a checkpoint's adapter is attached with.

    Args:
        checkpoint: The checkpoint.
        start: The plan that the run began with.

    Returns:
        The checkpoint's own plan if a procedure derived it from `start`, else `start`.

    Raises:
        ConfigurationError: the checkpoint belongs to another plan.
    """
    plan = read_adapter_plan(checkpoint)
    if plan.seal != start.seal and start.seal in plan.derived_from:
        return plan
    if not set(plan.known_seals) & set(start.known_seals):
        raise ConfigurationError(
            f"the run cannot resume from {checkpoint}: its adapter belongs to another plan.",
            found=f"plan {plan.seal[:12]}",
            expected=f"plan {start.seal[:12]}, or one derived from it",
            fix="resume with the plan that the run began with",
        )
    return start
