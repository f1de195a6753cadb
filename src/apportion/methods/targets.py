"""`targets`: which kinds of sites, or which single projections, a method may use."""

from __future__ import annotations

import difflib
import re
from typing import Any

from apportion.errors import ConfigurationError
from apportion.records.site import KINDS, Layout, Site

ALL_TARGETS: tuple[str, ...] = KINDS
_NUMBER = r"\d{1,18}"  # Python reads no number of thousands of digits
_SHOWN = 60  # characters of an option in a message


def parse_targets(value: Any) -> tuple[str, ...]:
    """Read targets from a comma-separated text or a sequence, and check the kinds' names.

    Args:
        value: Such as ``"attention,experts.down"`` or ``["attention", "experts.down"]``.

    Returns:
        The targets without repetition, in the order given.

    Raises:
        ConfigurationError: there is none, or a kind is unknown.
    """
    parts = value.split(",") if isinstance(value, str) else list(value)
    targets = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not targets:
        raise ConfigurationError("no targets were given.", fix=f"choose among {', '.join(KINDS)}")
    for target in targets:
        kind = target.partition(".")[0]
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(KINDS)}"
            raise ConfigurationError(f"there is no target {target!r}.", fix=hint)
    return targets


def parse_layers(value: str | None, layout: Layout) -> set[int] | None:
    """Read decoder layers from a text.

    Args:
        value: Such as ``4-15`` or ``0,2,4-7``; None for all.
        layout: The model's sites, for the layers that there are.

    Returns:
        The layers, or None for all.

    Raises:
        ConfigurationError: the text is no list of layers, or the model lacks one of them.
    """
    if value is None:
        return None
    known = {site.layer for site in layout.others} | {block.layer for block in layout.blocks}
    layers: set[int] = set()
    for part in value.split(","):
        match = re.fullmatch(rf"\s*({_NUMBER})\s*(?:-\s*({_NUMBER})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
            raise ConfigurationError(f"layers={shown!r} is not understood.", fix="give layers such as 4-15 or 0,2,4-7")
        # Comparing as it goes, this ends at the first layer that the model lacks, however far the range goes on.
        lacking = next((layer for layer in range(first, last + 1) if layer not in known), None)
        if lacking is not None:
            raise ConfigurationError(
                f"layers={value!r} asks for layer {lacking}, which this model lacks.",
                found=f"layers {min(known)} to {max(known)}",
            )
        layers.update(range(first, last + 1))
    return layers


def select_sites(
    layout: Layout, targets: tuple[str, ...], layers: set[int] | None = None, *, by_name: bool = True
) -> list[Site]:
    """Give the sites that the targets name, in the layout's order.

    Args:
        layout: The model's sites.
        targets: As `parse_targets` returns them.
        layers: As `parse_layers` returns them.
        by_name: Whether somebody asked for these targets; of a method's own ones, kinds that the model lacks are left
            out.

    Returns:
        The sites.

    Raises:
        ConfigurationError: the model has no site for a target that was asked for by name.
    """
    chosen = [
        site
        for site in layout.sites()
        if (site.kind in targets or f"{site.kind}.{site.projection}" in targets)
        and (layers is None or site.layer in layers)
    ]
    if by_name:
        have = {site.kind for site in chosen} | {f"{site.kind}.{site.projection}" for site in chosen}
        missing = [target for target in targets if target not in have]
        if missing:
            known = sorted({f"{site.kind}.{site.projection}" for site in layout.sites()})
            raise ConfigurationError(
                f"this model has nothing for the target {missing[0]!r}{' in these layers' if layers else ''}.",
                details={"model": layout.describe()},
                fix=f"choose among {', '.join(known)}, or a whole kind",
            )
    return chosen
