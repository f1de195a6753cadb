"""Mix the rows of several tasks into one training set."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from apportion.data.sources import Row
from apportion.errors import ConfigurationError


def parse_weights(text: str | None) -> dict[str, float] | None:
    """Parse weights such as ``a=2,b=1``.

    Args:
        text: The weights, or None.

    Returns:
        Weights by task; None if `text` is None.

    Raises:
        ConfigurationError: the text cannot be parsed, or a task has two weights.
    """
    if text is None:
        return None
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            value = float(number)
        except ValueError as error:
            raise ConfigurationError(f"weights={text!r} is not understood.", fix="give TASK=NUMBER,...") from error
        if name.strip() in weights:
            raise ConfigurationError(f"weights={text!r} gives {name.strip()!r} two weights.", fix="give one per task")
        weights[name.strip()] = value
    return weights


def mix(rows: Mapping[str, Sequence[Row]], weights: Mapping[str, float] | None = None, seed: int = 0) -> list[Row]:
    """Mix tasks into one training set with as many rows as all tasks together.

    Each task gets a share of the rows in proportion to its weight. If a task has more rows than its share, a random
    part is used; if it has fewer, its rows are repeated, each time in another order.

    Args:
        rows: Rows by task.
        weights: The tasks' weights; by default their numbers of rows, so that each row is used once.
        seed: Seed of the random draws.

    Returns:
        The rows, one task after the other.

    Raises:
        ConfigurationError: a weight is missing, not positive or for an unknown task, or a task has no row.
    """
    empty = [name for name, part in rows.items() if not part]
    if empty:
        raise ConfigurationError(f"task {empty[0]!r} has no row.", fix="give it rows, or leave it out")
    if weights is None:
        return [row for part in rows.values() for row in part]
    unknown = [name for name in weights if name not in rows] + [name for name in rows if name not in weights]
    if unknown:
        raise ConfigurationError(
            f"the weights and the data name different tasks: {unknown[0]!r}.",
            details={"data": ", ".join(rows)},
            fix="give one weight per task",
        )
    bad = [name for name, weight in weights.items() if not (weight > 0 and math.isfinite(weight))]
    if bad:
        raise ConfigurationError(
            f"weight {weights[bad[0]]} of task {bad[0]!r} is not positive and finite.", fix="give a number above 0"
        )
    total, whole = sum(map(len, rows.values())), sum(weights.values())
    mixed: list[Row] = []
    for name, part in rows.items():
        generator = random.Random(f"{seed}/{name}")  # noqa: S311 - no secret
        wanted = max(1, round(total * weights[name] / whole))
        while wanted > 0:
            drawn = generator.sample(list(part), min(wanted, len(part)))
            mixed.extend(drawn)
            wanted -= len(drawn)
    return mixed
