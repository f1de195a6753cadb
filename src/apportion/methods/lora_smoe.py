"""LoRA-SMoE: every task votes for the matrices that its gradients need; votes become LoRA experts."""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from apportion.errors import ApportionWarning, ConfigurationError
from apportion.methods.base import AdapterSettings, Method
from apportion.methods.budget import check_top_k, spent
from apportion.methods.targets import targeted_sites
from apportion.records.options import Groups, VoteOptions
from apportion.records.placement import Placement
from apportion.records.site import Site

if TYPE_CHECKING:
    from apportion.records.profile import Profile

Norms = Mapping[str, Mapping[str, float]]


def place_lora_smoe(profile: Profile, options: VoteOptions, settings: AdapterSettings) -> list[Placement]:
    """Give a matrix as many LoRA experts as tasks vote for it, and none where no task does.

    In every group each task votes for the `keep` share of matrices with the largest squared gradient norm, so every
    task spends the same, however large its data or its gradients; ties go to the earlier matrix.

    Args:
        profile: Sensitivities of every task.
        options: The share, or the budget that it follows from; the groups; experts a token.
        settings: Rank and scale of every LoRA expert.

    Returns:
        One placement a matrix with votes.

    Raises:
        ConfigurationError: the budget is too small, or a target was asked for whose gradient is not measured.
        ProfileError: sensitivity was not measured.

    Source: LoRA-SMoE, arXiv:2505.06272, allocation, as in the released code.
    Differs: ties are ordered; `keep` of 1 keeps all; the release keeps matrices strictly above the percentile.
    """
    norms = profile.measured_sensitivity()
    if len(norms) == 1:
        warnings.warn(
            f"the profile has one task, {profile.tasks[0]!r}: every matrix gets one vote or none, so this places plain "
            "LoRA. Profile several tasks for LoRA experts.",
            ApportionWarning,
            stacklevel=2,
        )
    return _place_votes(profile, norms, options, settings)


def place_random_votes(profile: Profile, options: VoteOptions, settings: AdapterSettings) -> list[Placement]:
    """Have as many tasks vote for as many matrices as `lora_smoe` would, drawn at random.

    Args:
        profile: For its tasks' number and its layout alone.
        options: As for `lora_smoe`.
        settings: Rank, scale and the seed of the draw.

    Returns:
        One placement a matrix with votes.

    Raises:
        ConfigurationError: the budget is too small, or a target was asked for whose gradient is not measured.

    Source: control for LoRA-SMoE, arXiv:2505.06272.
    Differs: nothing.
    """
    drawn = {}
    for number, task in enumerate(profile.tasks):
        generator = random.Random(f"{settings.seed}/{number}")  # noqa: S311 - no secret
        drawn[task] = {site.name: generator.random() for site in profile.layout.sites()}
    return _place_votes(profile, drawn, options, settings)


def num_kept(keep: float, num_matrices: int) -> int:
    """Tell how many matrices of a group a task votes for.

    They are those strictly above the group's (1 - keep) percentile with linear interpolation, as the released code has
    it: ceil(keep · (matrices - 1)), at least one. A `keep` of 1 keeps all.

    Args:
        keep: The share.
        num_matrices: Matrices in the group.

    Returns:
        At least 1.

    Example:
        >>> num_kept(0.6, 144) * 8
        688
    """
    return num_matrices if keep >= 1 else max(1, math.ceil(round(keep * (num_matrices - 1), 9)))


def count_votes(norms: Norms, groups: Sequence[Sequence[Site]], keep: float) -> Counter[str]:
    """Count the tasks that vote for each matrix.

    Args:
        norms: Squared gradient norm of each matrix, by task.
        groups: The matrices that are ranked together.
        keep: Share of each group that a task votes for.

    Returns:
        Votes by site name.
    """
    votes: Counter[str] = Counter()
    for task_norms in norms.values():
        for group in groups:
            ranked = sorted(group, key=lambda site: -task_norms[site.name])
            votes.update(site.name for site in ranked[: num_kept(keep, len(group))])
    return votes


def _place_votes(profile: Profile, norms: Norms, options: VoteOptions, settings: AdapterSettings) -> list[Placement]:
    """Turn votes into placements, at the share that is asked for or that the budget allows."""
    check_top_k(options, len(norms))
    sites = _votable(profile, targeted_sites(options, profile.layout), norms)
    groups = _grouped(sites, options.groups)

    def placed(keep: float) -> list[Placement]:
        votes = count_votes(norms, groups, keep)
        return [settings.place(site, votes[site.name], options.top_k) for site in sites if votes[site.name]]

    if options.budget is None:
        return placed(options.keep)
    # The shares at which some group's number changes; what is spent rises with the share.
    sizes = {len(group) for group in groups}
    shares = sorted({(count - 0.5) / (size - 1) for size in sizes for count in range(1, size)} | {1.0})
    low, high = 0, len(shares)
    while low < high:
        middle = (low + high) // 2
        taken, allowed = spent(options.budget, placed(shares[middle]), profile)
        low, high = (middle + 1, high) if taken <= allowed else (low, middle)
    if low == 0:
        least, allowed = spent(options.budget, placed(shares[0]), profile)
        raise ConfigurationError(
            f"the budget {options.budget} is too small: one matrix a task and group takes {least}.",
            fix="give more, a lower rank, or fewer targets",
        )
    return placed(shares[low - 1])


def _votable(profile: Profile, sites: Sequence[Site], norms: Norms) -> list[Site]:
    """Check that every site has a sensitivity."""
    first = next(iter(norms.values()))
    for site in sites:
        if site.name not in first:
            raise ConfigurationError(
                f"the sensitivity of {site.name} is not measured: it is no linear layer.",
                details={"model": profile.layout.describe()},
                fix=f"leave {site.kind} out of the targets",
            )
    return list(sites)


def _grouped(sites: Sequence[Site], groups: Groups) -> list[list[Site]]:
    """Gather the matrices that are ranked together."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        half = "attention" if site.kind == "attention" else "mlp"
        key = {"all": "", "attention/mlp": half, "type": f"{half}.{site.projection}"}[groups]
        found.setdefault(key, []).append(site)
    return list(found.values())


LORA_SMOE = Method(
    name="lora_smoe",
    summary="as many routed LoRA experts a matrix as tasks vote for it by gradient sensitivity",
    source="LoRA-SMoE, arXiv:2505.06272",
    options=VoteOptions,
    place=place_lora_smoe,
    reads_tasks=True,
)
RANDOM_VOTES = Method(
    name="random_votes",
    summary="control: as lora_smoe, with votes drawn at random",
    source="control at lora_smoe's budget",
    options=VoteOptions,
    place=place_random_votes,
    reads_tasks=True,
)
