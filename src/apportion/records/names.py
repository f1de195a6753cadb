"""Suggest the known name that is nearest to one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MAX_LISTED = 12


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is nearest, ignoring case; None if none is near.

    Args:
        name: A name.
        known: Names that exist.

    Returns:
        One of the known names, or None.
    """
    by_lower_case = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return by_lower_case[near[0]] if near else None


def suggestion(name: str, known: Iterable[str], otherwise: str = "choose among") -> str:
    """Return the fix for an unknown name: the nearest one, or the first of the known ones.

    Args:
        name: A name.
        known: Names that exist.
        otherwise: What to say before the known names if none is near.

    Returns:
        A sentence.

    Example:
        >>> suggestion("helora", ["hellora", "lora"])
        'did you mean hellora?'
    """
    names = list(known)
    near = nearest(name, names)
    return f"did you mean {near}?" if near else f"{otherwise} {', '.join(names[:_MAX_LISTED])}"
