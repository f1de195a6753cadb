"""LoRA-SMoE: each task votes for the matrices with its largest gradients; votes become LoRA experts."""

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
    """Give each matrix as many LoRA experts as tasks vote for it.

    In each group, each task votes for the `keep` share of matrices with the largest squared gradient norm. All tasks
    have the same number of votes, whatever the size of their data or gradients. Ties go to the earlier matrix.

    Args:
        profile: Sensitivities of every task.
        options: The share, or the budget that determines it; the groups; LoRA experts per token.
        settings: Rank and scale of each LoRA expert.

    Returns:
        One placement per matrix with votes.

    Raises:
        ConfigurationError: the budget is too small, or the gradient of a target was not measured.
        ProfileError: sensitivity was not measured.

    Source: LoRA-SMoE, arXiv:2505.06272, allocation, as in the released code.
    Differs: ties are ordered; `keep` of 1 keeps all, while the release keeps matrices strictly above the percentile.
    """
    norms = profile.measured_sensitivity()
    if len(norms) == 1:
        warnings.warn(
            f"the profile has one task, {profile.tasks[0]!r}: every matrix gets at most one vote, so this places plain "
            "LoRA. Profile several tasks to get LoRA experts.",
            ApportionWarning,
            stacklevel=2,
        )
    return _place_votes(profile, norms, options, settings)


def place_random_votes(profile: Profile, options: VoteOptions, settings: AdapterSettings) -> list[Placement]:
    """Place LoRA experts like `lora_smoe`, with random votes.

    Args:
        profile: Only its number of tasks and its layout are used.
        options: The same options as `lora_smoe`.
        settings: Rank, scale and random seed.

    Returns:
        One placement per matrix with votes.

    Raises:
        ConfigurationError: the budget is too small.

    Source: control for LoRA-SMoE, arXiv:2505.06272.
    Differs: nothing.
    """
    drawn = {}
    for number, task in enumerate(profile.tasks):
        generator = random.Random(f"{settings.seed}/{number}")  # noqa: S311 - no secret
        drawn[task] = {site.name: generator.random() for site in profile.layout.sites()}
    return _place_votes(profile, drawn, options, settings)


def num_voted(keep: float, num_matrices: int) -> int:
    """Return how many matrices of a group a task votes for.

    As in the released code, these are the matrices strictly above the group's (1 - keep) percentile with linear
    interpolation: ceil(keep · (matrices - 1)), at least one. A `keep` of 1 keeps all.

    Args:
        keep: The share.
        num_matrices: Matrices in the group.

    Returns:
        Number of matrices, at least 1.

    Example:
        >>> num_voted(0.6, 144) * 8
        688
    """
    return num_matrices if keep >= 1 else max(1, math.ceil(round(keep * (num_matrices - 1), 9)))


def count_votes(norms: Norms, groups: Sequence[Sequence[Site]], keep: float) -> Counter[str]:
    """Count the tasks that vote for each matrix.

    Args:
        norms: Squared gradient norm of each matrix, by task.
        groups: Groups of matrices that are ranked together.
        keep: Share of each group that a task votes for.

    Returns:
        Votes by site name.
    """
    votes: Counter[str] = Counter()
    for task_norms in norms.values():
        for group in groups:
            ranked = sorted(group, key=lambda site: -task_norms[site.name])
            votes.update(site.name for site in ranked[: num_voted(keep, len(group))])
    return votes


def _place_votes(profile: Profile, norms: Norms, options: VoteOptions, settings: AdapterSettings) -> list[Placement]:
    """Turn votes into placements, at the given share or the largest share that fits the budget."""
    check_top_k(options, len(norms))
    sites = _votable(profile, targeted_sites(options, profile.layout), norms)
    groups = _grouped(sites, options.groups)

    def placed(keep: float) -> list[Placement]:
        votes = count_votes(norms, groups, keep)
        return [settings.place(site, votes[site.name], options.top_k) for site in sites if votes[site.name]]

    if options.budget is None:
        return placed(options.keep)
    # The shares at which the number of votes of some group changes. The cost grows with the share.
    sizes = {len(group) for group in groups}
    shares = sorted({(count - 0.5) / (size - 1) for size in sizes for count in range(1, size)} | {1.0})
    low, high = 0, len(shares)
    while low < high:
        middle = (low + high) // 2
        taken, allowed = spent(options.budget, placed(shares[middle]), profile)
        low, high = (middle + 1, high) if taken <= allowed else (low, middle)
    if low == 0:
        cheapest, allowed = spent(options.budget, placed(shares[0]), profile)
        raise ConfigurationError(
            f"the budget {options.budget} is too small: one matrix per task and group costs {cheapest}.",
            fix="give a larger budget, a lower rank, or fewer targets",
        )
    return placed(shares[low - 1])


def _votable(profile: Profile, sites: Sequence[Site], norms: Norms) -> list[Site]:
    """Check that every site has a sensitivity."""
    first = next(iter(norms.values()))
    for site in sites:
        if site.name not in first:
            raise ConfigurationError(
                f"the sensitivity of {site.name} is not measured: it is not a linear layer.",
                details={"model": profile.layout.describe()},
                fix=f"remove {site.kind} from the targets",
            )
    return list(sites)


def _grouped(sites: Sequence[Site], groups: Groups) -> list[list[Site]]:
    """Group the matrices that are ranked together."""
    by_group: dict[str, list[Site]] = {}
    for site in sites:
        half = "attention" if site.kind == "attention" else "mlp"
        key = {"all": "", "attention/mlp": half, "type": f"{half}.{site.projection}"}[groups]
        by_group.setdefault(key, []).append(site)
    return list(by_group.values())


LORA_SMOE = Method(
    name="lora_smoe",
    summary="routed LoRA experts: one per matrix and task that votes for it, by gradient sensitivity",
    source="LoRA-SMoE, arXiv:2505.06272",
    options=VoteOptions,
    place=place_lora_smoe,
    reads_tasks=True,
)
RANDOM_VOTES = Method(
    name="random_votes",
    summary="control: lora_smoe with random votes",
    source="control at lora_smoe's budget",
    options=VoteOptions,
    place=place_random_votes,
    reads_tasks=True,
)
