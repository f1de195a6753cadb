"""`plan`: a profile and a method in, a checked plan with its exact cost out."""

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
from apportion.records.shapes import LARGEST_SCALE, MAX_WIDTH, SMALLEST_SCALE
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
    """Decide which sites get which adapter, from a profile alone: no model, no weights, no GPU.

    Args:
        profile: What was measured.
        method: A method's name; `apportion methods` lists them.
        rank: Rank of every adapter; on a site that is narrower than this, an error.
        alpha: Scale numerator; twice the rank where not given. The rank is the full rank of every adapted expert, not
            divided by the number of experts.
        seed: Seed of methods that draw at random.
        **options: The method's own options.

    Returns:
        The plan, with its exact cost.

    Raises:
        ConfigurationError: the method, an option, the rank or alpha is wrong, or does not fit the model.
        ProfileError: the profile lacks what the method needs.
        PlanError: the method places nothing, or more LoRA experts than a matrix can have.

    Example:
        >>> import apportion
        >>> model, tokenizer = apportion.embedded()
        >>> profile = apportion.profile(model, [tokenizer("Calculate 5 - 3 - 6.", return_tensors="pt")])
        >>> print(apportion.plan(profile, method="hellora", hot=4, rank=8).cost)
        166,400 trainable parameters
    """
    return build_plan(profile, method, check_settings(rank, alpha, seed), options)


def replan(profile: Profile, made: Plan) -> Plan:
    """Make a plan as another one was made, from the same profile or another one.

    A plan's options are complete with defaults, so that `plan` would take all of them as given.

    Args:
        profile: What was measured.
        made: The plan whose method, options, rank, scale and seed are taken.

    Returns:
        The plan.

    Raises:
        ConfigurationError: an option does not fit the profile's model.
        ProfileError: the profile lacks what the method needs.
        PlanError: the method places nothing.
    """
    options = find_method(made.method).options.differing(made.options)
    return build_plan(profile, made.method, check_settings(made.rank, made.alpha, made.seed), options)


def check_settings(rank: int, alpha: float | None, seed: int) -> AdapterSettings:
    """Refuse ranks and scales that no adapter can have.

    Args:
        rank: Rank of every adapter.
        alpha: Scale numerator; twice the rank where it is None.
        seed: Seed of methods that draw at random.

    Returns:
        All three.

    Raises:
        ConfigurationError: the rank is no whole number of at least 1, or above what any matrix has; alpha is not above
            0, not finite, or so large or small that float32 cannot hold alpha / rank.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_WIDTH:
        raise ConfigurationError(f"rank={rank!r} is not a rank.", fix=f"give a whole number from 1 to {MAX_WIDTH}")
    if alpha is None:
        return AdapterSettings(rank, 2.0 * rank, seed)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not alpha > 0:
        raise ConfigurationError(f"alpha={alpha!r} gives no scale.", fix="give a number above 0")
    if not SMALLEST_SCALE * rank <= alpha <= LARGEST_SCALE * rank:
        raise ConfigurationError(
            f"alpha={alpha!r} gives a scale alpha / rank that float32 cannot hold.",
            fix="give a number near the rank, such as twice the rank",
        )
    return AdapterSettings(rank, alpha, seed)


def build_plan(
    profile: Profile, name: str, settings: AdapterSettings, options: dict[str, Any], routing: RoutingSource = "profile"
) -> Plan:
    """Make a plan, saying where the shares of routed tokens come from.

    Args:
        profile: What was measured, or stands for it.
        name: The method's name.
        settings: Rank, scale and seed, as `check_settings` gives them.
        options: The method's own options.
        routing: Where the profile's counts come from.

    Returns:
        The plan.

    Raises:
        ConfigurationError: the method, an option or the rank is wrong, or does not fit the model.
        PlanError: the method places nothing.
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
    """Count what a method's adapters cost on a model.

    Args:
        layout: The model's sites.
        method: The method's name.
        settings: Rank, scale and seed, as `check_settings` gives them.
        options: The method's own options.
        profile: What was measured on this architecture; without it every expert is taken to have the same share of
            the tokens.

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
            f"what {method} costs depends on the tasks.",
            fix="give a profile, for all of these methods but random_votes one made with --sensitivity",
        )
    measured = even_profile(layout) if profile is None else profile
    return build_plan(measured, method, settings, options, "even" if profile is None else "profile").cost


def even_profile(layout: Layout) -> Profile:
    """Make a profile in which every expert of a layer takes the same share, for costs before anything is measured.

    Args:
        layout: The model's sites.

    Returns:
        A profile of as many tokens as every layer's experts divide, each routed to the layer's top-k.
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
    """Count what placements cost, beside LoRA on everything targeted.

    Args:
        profile: For the sites and for the routed slots a token of each expert.
        placements: The plan's adapters.
        everything: The same settings on every targeted site.
        routing: Where the profile's counts come from.

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
    """Refuse routed LoRA where a weight is no linear layer's own, and a rank above a site's smaller side.

    A router is exempt: it has as few rows as the layer has experts, and the published accounting of Mixtral gives its
    eight rows rank 32 like every other matrix.
    """
    for placement in placements:
        site = layout.by_name[placement.site]
        if placement.is_routed and site.storage != "linear":
            raise ConfigurationError(
                f"{placement.num_experts} LoRA experts cannot stand on {site.name}: its weight is no linear layer's.",
                fix=f"leave {site.kind} out of the targets",
            )
        if site.kind != "router" and placement.rank > min(site.in_features, site.out_features):
            raise ConfigurationError(
                f"rank {placement.rank} is above what {site.name} can have.",
                found=f"a matrix of {site.out_features} x {site.in_features}",
                fix=(
                    f"give a rank of at most {min(site.in_features, site.out_features)}, or leave {site.kind} out of "
                    "the targets"
                ),
            )
