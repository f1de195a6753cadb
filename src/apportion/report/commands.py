"""The commands that make a profile, a plan or a demonstration again, from what these say about themselves."""

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
    """Write the command that makes a profile.

    Args:
        profile: The profile.
        output: Its file.

    Returns:
        The command; None where the profile was made in Python and does not say from what.
    """
    told = profile.provenance
    if not isinstance(told.get("data"), dict) or not {"model", *_PROFILE_OPTIONS} <= set(told):
        return None
    words = ["profile", str(told["model"])]
    for task, source in told["data"].items():
        words += ["--data", f"{task}={source}"]
    for name in _PROFILE_OPTIONS:
        words += [_flag(name), str(told[name])]
    if told.get("sensitivity_procedure"):
        words += ["--sensitivity", "--sensitivity-procedure", told["sensitivity_procedure"]]
    return _line([*words, "-o", output])


def plan_command(plan: Plan, profile: str, output: str) -> str:
    """Write the command that makes a plan; options at their defaults are left out.

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
    given = model.differing(plan.options)
    for flag in model.flags():
        value = given.get(flag.option)
        if flag.key is not None:
            value = (value or {}).get(flag.key)
        if value is not None:
            words += [flag.spelling, _text(value)]
    return _line([*words, "-o", output])


def demo_command(output: str) -> str:
    """Write the command that runs the demonstration."""
    return _line(["demo", "-o", output])


def _flag(name: str) -> str:
    """Spell an option as the command line does."""
    return "--" + name.replace("_", "-")


def _text(value: Any) -> str:
    """Spell an option's value as the command line does."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _line(words: Sequence[str]) -> str:
    """Join words so that a shell takes them apart again."""
    return shlex.join(["apportion", *words])
