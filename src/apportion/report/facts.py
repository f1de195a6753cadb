"""The few figures at the top of a page."""

from __future__ import annotations

from apportion.records.plan import Plan
from apportion.records.profile import Profile
from apportion.report.material import Material
from apportion.study.store import StoredStudy


def facts(material: Material) -> list[tuple[str, str]]:
    """Say in names and values what the page is about.

    Args:
        material: What is shown.

    Returns:
        Pairs of a name and a value.
    """
    found: list[tuple[str, str]] = []
    if material.study is not None:
        found += _of_study(material.study)
    elif material.demo is not None:
        runs, settings = material.demo["runs"], material.demo["settings"]
        found += [
            ("runs", str(len(runs))),
            ("tasks", ", ".join(dict.fromkeys(run["task"] for run in runs))),
            ("methods", ", ".join(dict.fromkeys(run["method"] for run in runs))),
            ("steps a run", str(settings.get("steps", "?"))),
        ]
    elif material.plans:
        found += [fact for plan in material.plans.values() for fact in _of_plan(plan)]
    for name, profile in material.profiles.items():
        found += _of_profile(name, profile)
    return found


def _of_study(study: StoredStudy) -> list[tuple[str, str]]:
    """Say how large a study is."""
    told = study.settings
    planned = f" of {study.summary.planned_runs:,}" if study.summary else ""
    left_out = (
        f"; {study.num_left_out:,} records of other data, plans or settings left out" if study.num_left_out else ""
    )
    return [
        ("runs", f"{len(study.runs):,}{planned}{left_out}"),
        ("tasks", ", ".join(told.tasks)),
        (f"budgets, {told.unit}", ", ".join(f"{b:,}" if isinstance(b, int) else b for b in told.budgets)),
        ("contenders", str(len(told.contenders))),
        ("reference", told.reference),
        ("seeds", str(told.seeds)),
    ]


def _of_plan(plan: Plan) -> list[tuple[str, str]]:
    """Say what a plan is and costs."""
    return [
        ("method", plan.method),
        ("model", plan.model),
        ("rank, alpha", f"{plan.rank}, {plan.alpha:g}"),
        ("trained parameters", f"{plan.cost.trainable_parameters:,} ({plan.cost.trainable_frac:.2%} of all)"),
        ("of LoRA on all targets", f"{plan.cost.lora_count_ratio:.1%}"),
        ("adapter FLOPs a token", f"{plan.cost.adapter_flops_per_token:,.0f}"),
        ("adapters", ", ".join(f"{count:,} {kind}" for kind, count in plan.cost.sites_by_kind.items())),
    ]


def _of_profile(name: str, profile: Profile) -> list[tuple[str, str]]:
    """Say what was measured."""
    tokens = ", ".join(f"{task} {count:,}" for task, count in profile.tokens.items())
    return [("profiled model", f"{name}: {profile.layout.describe()}"), ("tokens profiled", tokens)]
