"""The data of the page's charts, as plain data for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from apportion.records.arrays import Array
from apportion.records.plan import Plan
from apportion.records.profile import Profile
from apportion.records.site_name import SiteName
from apportion.report.material import Material
from apportion.study.records import Interval, Run
from apportion.study.settings import FULL

_DIGITS = 6


def chart_data(material: Material) -> dict[str, Any]:
    """Return the data of all charts.

    Args:
        material: Contents of the page.

    Returns:
        ``profiles``, ``plans``, ``scores`` and the ``unit`` of the budgets. Numbers are rounded to six digits;
        infinity and NaN become null.
    """
    names = list(material.profiles)
    profiles = [_profile(name, material.profiles[name]) for name in names]
    return {
        "profiles": profiles or [_unmeasured(plan) for plan in material.plans.values()],
        "plans": [_plan(label, plan, material, names) for label, plan in _labelled_plans(material)],
        "scores": _scores(material),
        "unit": material.study.settings.unit if material.study else None,
    }


def matrix_place(site: str) -> tuple[int, str]:
    """Return the row and the column of a site in the map of matrices.

    Args:
        site: The site's name.

    Returns:
        The decoder layer, and the name below it. All experts of a layer share a name.

    Example:
        >>> matrix_place("model.layers.3.mlp.experts.5.gate_proj")
        (3, 'mlp.experts.*.gate_proj')
        >>> matrix_place("model.layers.0.self_attn.q_proj")
        (0, 'self_attn.q_proj')
    """
    name = SiteName.parse(site)
    return name.layer or 0, name.below_layer


def _profile(name: str, profile: Profile) -> dict[str, Any]:
    """Return the layers of a profile, and each task's measurements of experts and matrices."""
    tasks = [_task(task, profile.of_task(task), profile.tokens[task]) for task in profile.tasks]
    if len(tasks) > 1:
        tasks.append(_task("all tasks together", profile, profile.total_tokens()))
    return {
        "name": name,
        "model": profile.layout.describe(),
        "layers": [
            {"layer": block.layer, "experts": block.num_experts, "top_k": block.top_k}
            for block in profile.layout.blocks
        ],
        "tasks": tasks,
    }


def _unmeasured(plan: Plan) -> dict[str, Any]:
    """Return the layers of a plan without a profile: those with planned experts, up to the highest planned id."""
    width = max((max(ids) for ids in plan.experts_by_layer().values()), default=0) + 1
    layers = [matrix_place(block)[0] for block in plan.experts_by_layer()]
    return {
        "name": plan.base_model or plan.model,
        "model": plan.model,
        "layers": [{"layer": layer, "experts": width, "top_k": None} for layer in layers],
        "tasks": [],
    }


def _task(name: str, profile: Profile, tokens: int) -> dict[str, Any]:
    """Return the measurements of a profile, summed over its tasks."""
    measured = set(profile.sensitivity) == set(profile.tasks)
    grids = {}
    if profile.layout.is_moe:
        grids = {"count": _rows(profile, profile.counts_LE), "mass": _rows(profile, profile.mass_LE)}
        if measured:
            grids["sensitivity"] = _rows(profile, profile.sensitivity_LE)
    sites: dict[str, float] = {}
    if measured:
        for norms in profile.sensitivity.values():
            for site, norm in norms.items():
                sites[site] = sites.get(site, 0.0) + norm
    return {"name": name, "tokens": tokens, "grids": grids, "matrices": _matrices(sites.items())}


def _rows(profile: Profile, heat_LE: Array) -> list[list[float | None]]:
    """Remove the padding beyond each layer's number of experts."""
    return [
        [_short(value) for value in row[: block.num_experts]]
        for block, row in zip(profile.layout.blocks, heat_LE.tolist(), strict=True)
    ]


def _matrices(values: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    """Sum the values of sites into one entry per layer and kind of matrix."""
    cells: dict[tuple[int, str], list[float]] = {}
    for site, value in values:
        cells.setdefault(matrix_place(site), []).append(value)
    return [
        {"layer": layer, "name": name, "sum": _short(sum(site_values)), "sites": len(site_values)}
        for (layer, name), site_values in cells.items()
    ]


def _labelled_plans(material: Material) -> list[tuple[dict[str, str], Plan]]:
    """Return every plan with a group and a label: a study's task, contender and budget, or the file's name.

    A plan shared by several contenders or budgets of a study is repeated for each.
    """
    if material.study is None:
        return [
            ({"group": "", "label": file.removesuffix("/plan.json")}, made) for file, made in material.plans.items()
        ]
    runs: dict[tuple[str, str, str, int], dict[str, Run]] = {}
    for run in material.study.runs:
        if run.plan in material.plans:
            runs.setdefault((run.model, run.task, run.contender, run.budget), {})[run.plan] = run
    labels = []
    for (_, task, contender, budget), drawn in runs.items():
        for file, run in drawn.items():
            seed = f", seed {run.seed}" if len(drawn) > 1 else ""
            label = f"{contender} at {budget:,} {run.unit}{seed}"
            labels.append(({"group": task, "label": label}, material.plans[file]))
    return labels


def _plan(label: dict[str, str], plan: Plan, material: Material, names: list[str]) -> dict[str, Any]:
    """Return a plan's ranks by expert, and by layer and kind of matrix."""
    owners = [number for number, name in enumerate(names) if material.profiles[name].fingerprint == plan.fingerprint]
    profile = material.profiles[names[owners[0]]] if owners else None
    return label | {
        "method": plan.method,
        "profiles": owners if names else [0],
        "experts": _expert_ranks(plan, profile),
        "matrices": _matrices((p.site, p.rank * p.num_experts) for p in plan.placements),
    }


def _expert_ranks(plan: Plan, profile: Profile | None) -> list[dict[str, int]]:
    """Return the row (layer with experts), the id and the largest rank of each planned expert."""
    ranks: dict[tuple[str, int], int] = {}
    for placement in plan.placements:
        module, expert, _ = placement.name
        if expert is not None:
            key = (module, expert)
            ranks[key] = max(ranks.get(key, 0), placement.rank)
    rows = {block: row for row, block in enumerate(profile.layers if profile else plan.experts_by_layer())}
    return [
        {"row": rows[block], "expert": expert, "rank": rank} for (block, expert), rank in ranks.items() if block in rows
    ]


def _scores(material: Material) -> list[dict[str, Any]]:
    """Return the scores of a study with their intervals, and the scores of the untrained model."""
    study = material.study
    if study is None or study.summary is None:
        return []
    before = {(run.model, run.task): run.before for run in study.runs}
    scores = []
    for cell in study.summary.cells:
        base = before.get((cell.model, cell.task))
        scores.append(
            {
                **cell.model_dump(include={"model", "task", "contender", "budget", "spent", "seeds"}),
                "budgeted": study.settings.contender(cell.contender).method != FULL,
                "exact_match": _interval(cell.exact_match),
                "loss": _interval(cell.loss),
                "forgetting": _interval(cell.forgetting),
                "before": {"exact_match": base and base.exact_match, "loss": base and base.loss},
            }
        )
    return scores


def _interval(interval: Interval | None) -> list[float | None] | None:
    """Return estimate, low and high."""
    return [_short(interval.estimate), _short(interval.low), _short(interval.high)] if interval else None


def _short(value: float) -> float | None:
    """Round to the visible digits; integers stay integers, and infinity and NaN become None."""
    if isinstance(value, int):
        return value
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
