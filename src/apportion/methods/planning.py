"""`plan`: make a plan with its exact cost from a profile and a method."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from apportion.counting import count, flops_per_token
from apportion.errors import ConfigurationError, PlanError, PlanMismatchError, ProfileError
from apportion.methods.base import AdapterSettings
from apportion.methods.registry import find_method
from apportion.methods.targets import targeted_sites
from apportion.records.cost import Cost, RoutingSource
from apportion.records.options import read_options
from apportion.records.placement import Placement
from apportion.records.plan import LORI, PLAIN, Plan
from apportion.records.plan_schema import in_file_order
from apportion.records.profile import Profile
from apportion.records.shapes.base import LARGEST_SCALE, MAX_WIDTH, SMALLEST_SCALE
from apportion.records.site import Layout
from apportion.records.tensors import Tensors


def plan(
    profile: Profile,
    method: str = "hellora",
    *,
    rank: int = 32,
    alpha: float | None = None,
    seed: int = 0,
    **options: Any,
) -> Plan:
    """Choose which sites get which adapter, from a profile. Needs no model, weights or GPU.

    Args:
        profile: The profile.
        method: Name of the method; `apportion methods` lists all.
        rank: Rank of every adapter; must not exceed the smaller side of a site. Each adapted expert gets the full rank;
            it is not divided by the number of experts.
        alpha: Scale numerator; default: twice the rank.
        seed: Random seed, for methods that sample.
        **options: Options of the method.

    Returns:
        The plan, with its exact cost.

    Raises:
        ConfigurationError: the method, an option, the rank or alpha is invalid, or does not fit the model.
        ProfileError: the profile lacks data that the method needs.
        PlanError: the method places no adapter, or more LoRA experts than a matrix can have.

    Example:
        >>> import apportion
        >>> model, tokenizer = apportion.embedded()
        >>> profile = apportion.profile(model, [tokenizer("Calculate 5 - 3 - 6.", return_tensors="pt")])
        >>> print(apportion.plan(profile, method="hellora", hot=4, rank=8).cost)
        166,400 trainable parameters
    """
    return build_plan(profile, method, check_settings(rank, alpha, seed), options)


def replan(profile: Profile, made: Plan) -> Plan:
    """Make a plan with the settings of another plan, from the same or another profile.

    Use this instead of ``plan(profile, made.method, **made.options)``: a plan stores all options including defaults,
    and `plan` would treat them all as given.

    Args:
        profile: The profile.
        made: The plan that provides the method, options, rank, scale and seed.

    Returns:
        The plan.

    Raises:
        ConfigurationError: an option does not fit the profile's model.
        ProfileError: the profile lacks data that the method needs.
        PlanError: the method places no adapter.
    """
    options = find_method(made.method).options.differing(made.options)
    return build_plan(profile, made.method, check_settings(made.rank, made.alpha, made.seed), options)


def check_settings(rank: int, alpha: float | None, seed: int) -> AdapterSettings:
    """Check rank and alpha.

    Args:
        rank: Rank of every adapter.
        alpha: Scale numerator; None for twice the rank.
        seed: Random seed, for methods that sample.

    Returns:
        The settings.

    Raises:
        ConfigurationError: the rank is not an integer in range, or alpha is not positive and finite, or float32 cannot
            hold alpha / rank.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_WIDTH:
        raise ConfigurationError(f"rank={rank!r} is not a rank.", fix=f"give an integer from 1 to {MAX_WIDTH}")
    if alpha is None:
        return AdapterSettings(rank, 2.0 * rank, seed)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not alpha > 0:
        raise ConfigurationError(f"alpha={alpha!r} is not a positive number.", fix="give a number above 0")
    if not SMALLEST_SCALE * rank <= alpha <= LARGEST_SCALE * rank:
        raise ConfigurationError(
            f"alpha={alpha!r} gives a scale alpha / rank that float32 cannot hold.",
            fix="give a number near the rank, such as twice the rank",
        )
    return AdapterSettings(rank, alpha, seed)


def build_plan(
    profile: Profile, name: str, settings: AdapterSettings, options: dict[str, Any], routing: RoutingSource = "profile"
) -> Plan:
    """Make a plan from a measured or an assumed profile.

    Args:
        profile: The profile.
        name: Name of the method.
        settings: Rank, scale and seed, as returned by `check_settings`.
        options: Options of the method.
        routing: Source of the profile's counts.

    Returns:
        The plan.

    Raises:
        ConfigurationError: the method, an option or the rank is invalid, or does not fit the model.
        PlanError: the method places no adapter.
    """
    chosen = find_method(name)
    checked = read_options(chosen.options, options, f"method {name}")
    settings = replace(settings, ranks=checked.ranks, sparsity=checked.sparsity)
    targeted = targeted_sites(checked, profile.layout)
    placements = in_file_order(chosen.place(profile, checked, settings))
    if not placements:
        raise PlanError(f"method {name} places no adapter on {profile.layout.describe()}.", fix="choose other targets")
    _check_placements(profile.layout, placements)
    return Plan(
        method=name,
        options=checked.model_dump(mode="json"),
        rank=settings.rank,
        alpha=settings.alpha,
        seed=settings.seed,
        model=profile.layout.describe(),
        base_model=profile.provenance.get("model"),
        fingerprint=profile.fingerprint,
        profile_digest=profile.digest if routing == "profile" else None,
        cost=count_cost(profile, placements, replace(settings, sparsity=0.0).at(targeted), routing),
        placements=placements,
        procedure={"name": LORI if settings.sparsity else PLAIN},
    )


def cost_on(
    layout: Layout, method: str, settings: AdapterSettings, options: dict[str, Any], profile: Profile | None = None
) -> Cost:
    """Count the cost of a method's adapters on a model.

    Args:
        layout: The model's sites.
        method: Name of the method.
        settings: Rank, scale and seed, as returned by `check_settings`.
        options: Options of the method.
        profile: Profile of this architecture; without it, even routing is assumed.

    Returns:
        The cost.

    Raises:
        ConfigurationError: the method, an option or the rank does not fit the model.
        PlanMismatchError: the profile is of another architecture.
        ProfileError: the method needs a profile, or one with sensitivities.
    """
    if profile is not None and profile.fingerprint != layout.fingerprint:
        raise PlanMismatchError(
            "the profile was made for another architecture.",
            details={"model": layout.describe(), "profile": profile.layout.describe()},
            fix="profile this model",
        )
    if profile is None and find_method(method).reads_tasks:
        raise ProfileError(
            f"the cost of {method} depends on the tasks.",
            fix="give a profile" + ("" if method == "random_votes" else " made with --sensitivity"),
        )
    measured = even_profile(layout) if profile is None else profile
    return build_plan(measured, method, settings, options, "even" if profile is None else "profile").cost


def even_profile(layout: Layout) -> Profile:
    """Return a profile with even routing, to count costs without a measured profile.

    Args:
        layout: The model's sites.

    Returns:
        A profile in which all experts of a layer have equal counts. Its number of tokens is the least common multiple
        of the layers' numbers of experts.
    """
    sizes = [block.num_experts for block in layout.blocks]
    tokens = math.lcm(*sizes) if sizes else 1
    counts = np.zeros((len(sizes), max(sizes, default=0)), dtype=np.int64)
    for row, block in enumerate(layout.blocks):
        counts[row, : block.num_experts] = block.top_k * tokens // block.num_experts
    return Profile(layout, Tensors({"even": counts}), Tensors({"even": counts.astype(np.float64)}), {"even": tokens})


def count_cost(
    profile: Profile, placements: Iterable[Placement], everything: Iterable[Placement], routing: RoutingSource
) -> Cost:
    """Count the cost of placements, and of LoRA on all targets for reference.

    Args:
        profile: Profile with the sites and each expert's routed slots per token.
        placements: The plan's adapters.
        everything: LoRA with the same settings on every targeted site.
        routing: Source of the profile's counts.

    Returns:
        The cost.
    """
    sites = profile.layout.by_name
    planned = list(placements)
    counts, reference = count(planned, sites), list(everything)
    return Cost(
        trainable_parameters=counts.trained,
        stored_parameters=counts.stored(),
        frozen_parameters=counts.drawn,
        base_parameters=profile.layout.base_parameters,
        adapter_flops_per_token=flops_per_token(planned, profile),
        lora_parameters=count(reference, sites).trained,
        lora_flops_per_token=flops_per_token(reference, profile),
        routing=routing if profile.layout.is_moe else "none",
        sites_by_kind=dict(Counter(sites[p.site].kind for p in planned)),
        stored_indices=counts.indices,
    )


def _check_placements(layout: Layout, placements: tuple[Placement, ...]) -> None:
    """Refuse shapes that a matrix cannot have, routed LoRA on other than linear layers, and too large ranks.

    Routers are exempt from the rank check: they have as few rows as experts, and the published accounting of Mixtral
    uses rank 32 for its router of eight rows.
    """
    for placement in placements:
        site = layout.by_name[placement.site]
        try:
            placement.shape.check(site.in_features, site.out_features)
        except PlanError as error:
            raise error.at(site.name) from error
        if placement.is_routed and site.storage != "linear":
            raise ConfigurationError(
                f"{placement.num_experts} LoRA experts cannot be placed on {site.name}: it is not a linear layer.",
                fix=f"remove {site.kind} from the targets",
            )
        if site.kind != "router" and placement.rank > min(site.in_features, site.out_features):
            raise ConfigurationError(
                f"rank {placement.rank} is too large for {site.name}.",
                found=f"a matrix of {site.out_features} x {site.in_features}",
                fix=(
                    f"give a rank of at most {min(site.in_features, site.out_features)}, or remove {site.kind} from "
                    "the targets"
                ),
            )
