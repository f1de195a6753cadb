"""Commands that reproduce a profile, a plan or a demonstration, from their metadata."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from apportion.methods.registry import METHODS
from apportion.records.options import MethodOptions
from apportion.records.plan import Plan
from apportion.records.profile import Profile

_PROFILE_OPTIONS = ("samples", "max_length", "batch_size", "seed")


def profile_command(profile: Profile, output: str) -> str | None:
    """Return the command that makes a profile.

    Args:
        profile: The profile.
        output: Its file.

    Returns:
        The command; None if the profile was made in Python and its data are unknown.
    """
    provenance = profile.provenance
    if not isinstance(provenance.get("data"), dict) or not {"model", *_PROFILE_OPTIONS} <= set(provenance):
        return None
    words = ["profile", str(provenance["model"])]
    for task, source in provenance["data"].items():
        words += ["--data", f"{task}={source}"]
    for name in _PROFILE_OPTIONS:
        words += [_flag(name), str(provenance[name])]
    if provenance.get("sensitivity_procedure"):
        words += ["--sensitivity", "--sensitivity-procedure", provenance["sensitivity_procedure"]]
    return _line([*words, "-o", output])


def plan_command(plan: Plan, profile: str, output: str) -> str:
    """Return the command that makes a plan, without options at their defaults.

    Args:
        plan: The plan.
        profile: The profile's file.
        output: The plan's file.

    Returns:
        The command.
    """
    words = ["plan", profile, "--method", plan.method, "--rank", str(plan.rank), "--alpha", f"{plan.alpha:g}"]
    words += ["--seed", str(plan.seed)]
    model = METHODS[plan.method].options if plan.method in METHODS else MethodOptions
    changed = model.differing(plan.options)
    for flag in model.flags():
        value = changed.get(flag.option)
        if flag.key is not None:
            value = (value or {}).get(flag.key)
        if value is not None:
            words += [flag.spelling, _text(value)]
    return _line([*words, "-o", output])


def demo_command(output: str) -> str:
    """Return the command that runs the demonstration."""
    return _line(["demo", "-o", output])


def _flag(name: str) -> str:
    """Return the flag of an option."""
    return "--" + name.replace("_", "-")


def _text(value: Any) -> str:
    """Format an option's value for the command line."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _line(words: Sequence[str]) -> str:
    """Join words into a command, quoted for the shell."""
    return shlex.join(["apportion", *words])
