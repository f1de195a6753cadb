"""Parsers of options written as text: ``25%``, ``coverage=0.6``, ``flops=80000``, ``4-15``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from apportion.errors import ConfigurationError, shortened
from apportion.records.names import suggestion
from apportion.records.site import KINDS

_NUMBER = r"\d{1,18}"  # Python refuses to parse numbers of thousands of digits


def parse_targets(value: Any) -> tuple[str, ...]:
    """Parse targets from comma-separated text or a sequence, and check the names of the kinds.

    Args:
        value: Such as ``"attention,experts.down"`` or ``["attention", "experts.down"]``.

    Returns:
        The targets without duplicates, in the given order.

    Raises:
        ConfigurationError: no target is given, or a kind is unknown.
    """
    parts = value.split(",") if isinstance(value, str) else list(value)
    targets = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not targets:
        raise ConfigurationError("no targets were given.", fix=f"choose among {', '.join(KINDS)}")
    for target in targets:
        kind = target.partition(".")[0]
        if kind not in KINDS:
            raise ConfigurationError(f"there is no target {target!r}.", fix=suggestion(kind, KINDS))
    return targets


def layer_ranges(value: str) -> list[tuple[int, int]]:
    """Parse ranges of decoder layers, without expanding them.

    Args:
        value: Such as ``4-15`` or ``0,2,4-7``.

    Returns:
        The first and last layer of each range.

    Raises:
        ConfigurationError: the text is not a list of layers.
    """
    ranges = []
    for part in value.split(","):
        match = re.fullmatch(rf"\s*({_NUMBER})\s*(?:-\s*({_NUMBER})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigurationError(
                f"layers={shortened(value)!r} is not understood.", fix="give layers such as 4-15 or 0,2,4-7"
            )
        ranges.append((first, last))
    return ranges


def check_layers(value: str | None) -> str | None:
    """Check that a text is a list of layers.

    Args:
        value: Text for `layer_ranges`; None for all layers.

    Returns:
        The text, unchanged.

    Raises:
        ConfigurationError: the text is not a list of layers.
    """
    if value is not None:
        layer_ranges(value)
    return value


def check_ranks(value: Mapping[str, int]) -> Mapping[str, int]:
    """Check ranks by kind.

    Args:
        value: Ranks by kind.

    Returns:
        The ranks, unchanged.

    Raises:
        ConfigurationError: a kind is unknown, or a rank is below 1.
    """
    for kind, rank in value.items():
        if kind not in KINDS:
            raise ConfigurationError(
                f"a rank was given for {kind!r}, which is not a kind.", fix=f"choose among {', '.join(KINDS)}"
            )
        if rank < 1:
            raise ConfigurationError(f"rank={rank} for {kind} is not a rank.", fix="give an integer of at least 1")
    return value


def parse_hot(value: Any) -> int | str:
    """Parse ``hot``: a number of experts, a percentage of the experts, or the share of routed slots to cover.

    Args:
        value: Such as ``8``, ``"8"``, ``"25%"`` or ``"coverage=0.6"``.

    Returns:
        A number, or the text in its shortest form.

    Raises:
        ConfigurationError: the value has none of these forms, or is out of range.
    """
    text = str(value).strip().lower()
    forms = 'a number of experts (8), a percentage ("25%") or a share of the routed slots ("coverage=0.6")'
    try:
        if text.endswith("%"):
            percent = float(text[:-1])
            if not 0 < percent <= 100:
                raise ConfigurationError(
                    f"hot={shortened(text)} is out of range.", fix="give a percentage above 0 and up to 100"
                )
            return f"{percent:g}%"
        if text.startswith("coverage="):
            share = float(text.removeprefix("coverage="))
            if not 0 < share <= 1:
                raise ConfigurationError(
                    f"hot={shortened(text)} is out of range.", fix="give a share above 0 and up to 1"
                )
            return f"coverage={share:g}"
        number = int(text)
    except ValueError as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"hot={shortened(repr(value))} is not understood.", fix=f"give {forms}") from error
    if number < 1:
        raise ConfigurationError(f"hot={number} keeps no experts.", fix="give at least 1, or use --method attention")
    return number


def parse_budget(value: Any) -> str | None:
    """Parse a budget.

    Args:
        value: Such as ``5000000``, ``"parameters=5000000"``, ``"flops=80000"`` or ``"experts=688"``; None for no
            budget.

    Returns:
        ``parameters=N``, ``flops=N`` or ``experts=N``.

    Raises:
        ConfigurationError: the value has none of these forms.
    """
    if value is None:
        return None
    match = re.fullmatch(r"(?:(experts|parameters|flops)=)?([\d_,]{1,24})", str(value).strip().lower())
    number = int(re.sub("[_,]", "", match[2]) or 0) if match else 0
    if match is None or number < 1:
        raise ConfigurationError(
            f"budget={value!r} is not understood.",
            fix="give parameters (5000000), operations per token (flops=80000) or LoRA experts (experts=688)",
        )
    return f"{match[1] or 'parameters'}={number}"


def parse_plain_budget(value: Any) -> str | None:
    """Parse a budget of a method that places plain LoRA and so cannot count LoRA experts.

    Args:
        value: A budget for `parse_budget`.

    Returns:
        ``parameters=N`` or ``flops=N``.

    Raises:
        ConfigurationError: the value has neither form.
    """
    budget = parse_budget(value)
    if budget and budget.startswith("experts="):
        raise ConfigurationError(
            f"budget={value!r} counts LoRA experts, but this method places plain LoRA.",
            fix="give parameters (5000000) or operations per token (flops=80000)",
        )
    return budget


def parse_share(value: Any) -> Any:
    """Parse a share, which may be written as a percentage.

    Args:
        value: Such as ``0.25`` or ``"25%"``.

    Returns:
        The share. Any value that is not a percentage is returned unchanged.
    """
    text = str(value).strip()
    number = text.removesuffix("%")
    return float(number) / 100 if text != number and number.replace(".", "", 1).isdigit() else value


def parse_depths(value: Any) -> str:
    """Check numbers of LoRA experts by depth.

    Args:
        value: Such as ``"2-4-6-8"``.

    Returns:
        The text, unchanged.

    Raises:
        ConfigurationError: the text is not a list of numbers of at least 1.
    """
    if not re.fullmatch(r"[1-9]\d{,17}(-[1-9]\d{,17})*", str(value)):
        raise ConfigurationError(
            f"experts={shortened(str(value))!r} is not understood.",
            fix="give one number per part of the layers, first to last: 2-4-6-8",
        )
    return str(value)
