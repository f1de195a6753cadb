"""The facts at the top of a page."""

from __future__ import annotations

from apportion.records.plan import Plan
from apportion.records.profile import Profile
from apportion.report.material import Material
from apportion.study.store import StoredStudy


def facts(material: Material) -> list[tuple[str, str]]:
    """Return the main facts of a page.

    Args:
        material: Contents of the page.

    Returns:
        Pairs of a name and a value.
    """
    pairs: list[tuple[str, str]] = []
    if material.study is not None:
        pairs += _of_study(material.study)
    elif material.demo is not None:
        runs, settings = material.demo["runs"], material.demo["settings"]
        pairs += [
            ("runs", str(len(runs))),
            ("tasks", ", ".join(dict.fromkeys(run["task"] for run in runs))),
            ("methods", ", ".join(dict.fromkeys(run["method"] for run in runs))),
            ("steps per run", str(settings.get("steps", "?"))),
        ]
    elif material.plans:
        pairs += [fact for plan in material.plans.values() for fact in _of_plan(plan)]
    for name, profile in material.profiles.items():
        pairs += _of_profile(name, profile)
    return pairs


def _of_study(study: StoredStudy) -> list[tuple[str, str]]:
    """Return the size of a study."""
    settings = study.settings
    planned = f" of {study.summary.planned_runs:,}" if study.summary else ""
    left_out = (
        f"; {study.num_left_out:,} records with other data, plans or settings skipped" if study.num_left_out else ""
    )
    return [
        ("runs", f"{len(study.runs):,}{planned}{left_out}"),
        ("tasks", ", ".join(settings.tasks)),
        (f"budgets, {settings.unit}", ", ".join(f"{b:,}" if isinstance(b, int) else b for b in settings.budgets)),
        ("contenders", str(len(settings.contenders))),
        ("reference", settings.reference),
        ("seeds", str(settings.seeds)),
    ]


def _of_plan(plan: Plan) -> list[tuple[str, str]]:
    """Return the settings and the cost of a plan."""
    return [
        ("method", plan.method),
        ("model", plan.model),
        ("rank, alpha", f"{plan.rank}, {plan.alpha:g}"),
        ("trained parameters", f"{plan.cost.trainable_parameters:,} ({plan.cost.trainable_frac:.2%} of all)"),
        ("relative to LoRA on all targets", f"{plan.cost.lora_count_ratio:.1%}"),
        ("adapter FLOPs per token", f"{plan.cost.adapter_flops_per_token:,.0f}"),
        ("adapters", ", ".join(f"{count:,} {kind}" for kind, count in plan.cost.sites_by_kind.items())),
    ]


def _of_profile(name: str, profile: Profile) -> list[tuple[str, str]]:
    """Return the model and the tokens of a profile."""
    tokens = ", ".join(f"{task} {count:,}" for task, count in profile.tokens.items())
    return [("profiled model", f"{name}: {profile.layout.describe()}"), ("tokens profiled", tokens)]
