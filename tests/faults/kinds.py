"""All kinds of files that the package reads."""

from __future__ import annotations

from pathlib import Path

import apportion
from apportion.peft.masks import random_mask
from faults.data_kinds import data_kinds
from faults.folder_kinds import adapter_kinds, run_kinds, study_kinds
from faults.kind import Kind
from faults.record_kinds import mask_kinds, partial_kind, plan_kinds, profile_kinds
from faults.shown_kinds import export_kinds, layout_kinds, report_kinds, shown_kinds
from study_folder import tiny_profile
from tiny_models import build_tiny


def all_kinds(folder: Path) -> list[Kind]:
    """Make a good file of every kind.

    Args:
        folder: Where to.

    Returns:
        The kinds.
    """
    model = build_tiny("olmoe")
    profile = tiny_profile(("a", "b"))
    plans = {
        "plan": apportion.plan(profile, "hellora", hot=2, rank=2),
        "sparse": apportion.plan(profile, "hellori", hot=1, rank=2, sparsity=0.9, targets="experts"),
        "attention": apportion.plan(profile, "attention", rank=2),
        "routed": apportion.plan(profile, "uniform", rank=1, experts=2, targets="attention"),
    }
    kinds = [
        *plan_kinds(folder, plans),
        *profile_kinds(folder, profile),
        *mask_kinds(folder, random_mask(plans["sparse"].placements, profile.layout.by_name, seed=0)),
        partial_kind(folder, model),
        *adapter_kinds(folder, model, plans),
        *study_kinds(folder),
        *run_kinds(folder),
        *data_kinds(folder),
    ]
    return [
        *kinds,
        *shown_kinds(kinds),
        *report_kinds(folder),
        *export_kinds(folder, build_tiny("olmoe"), plans["attention"]),
        *layout_kinds(folder, build_tiny("olmoe")),
    ]
