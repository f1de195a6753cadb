"""Site names in short form with braces: ``a.{0,3}.{gate,up}``."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable

from apportion.errors import PlanError

_CHOICES = re.compile(r"\{([^{}]*)\}")


def fold_braces(names: Iterable[str]) -> list[str]:
    """Fold names into patterns. Names that differ only in their last part, or in the number before it, are merged.

    Args:
        names: Site names.

    Returns:
        Patterns that `expand_braces` expands to the same names.

    Example:
        >>> fold_braces(["m.0.up", "m.0.down", "m.3.up", "m.3.down", "n.q"])
        ['m.{0,3}.{up,down}', 'n.q']
    """
    by_parent: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        by_parent.setdefault(parent, []).append(last)
    by_block: dict[tuple[str, bool, str], list[str]] = {}
    for parent, lasts in by_parent.items():
        tail = lasts[0] if len(lasts) == 1 else "{" + ",".join(lasts) + "}"
        block, _, number = parent.rpartition(".")
        numbered = number.isdigit()
        by_block.setdefault((block if numbered else parent, numbered, tail), []).append(number if numbered else "")
    folded = []
    for (block, _, tail), numbers in by_block.items():
        middle = numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}"
        folded.append(".".join(part for part in (block, middle, tail) if part))
    return folded


def num_expanded(pattern: str) -> int:
    """Count the names that a pattern expands to, without expanding it.

    Args:
        pattern: A name with braces.

    Returns:
        The number of names.

    Raises:
        PlanError: braces are unbalanced or nested.

    Example:
        >>> num_expanded("m.{0,3}.{up,down}")
        4
    """
    if re.search(r"[{}]", _CHOICES.sub("", pattern)):
        raise PlanError("braces are unbalanced or nested")
    return math.prod(choices.count(",") + 1 for choices in _CHOICES.findall(pattern))


def expand_braces(pattern: str) -> list[str]:
    """Expand one pattern of `fold_braces`.

    Args:
        pattern: A name with braces. Check its size with `num_expanded` first.

    Returns:
        The names.

    Example:
        >>> expand_braces("m.{0,3}.{up,down}")
        ['m.0.up', 'm.0.down', 'm.3.up', 'm.3.down']
    """
    parts = _CHOICES.split(pattern)  # fixed text and choices alternate
    return [
        "".join(chosen)
        for chosen in itertools.product(*(part.split(",") if place % 2 else [part] for place, part in enumerate(parts)))
    ]
