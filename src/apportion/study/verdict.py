"""Describe a study's comparisons in sentences."""

from __future__ import annotations

from apportion.study.records import Comparison, Interval, Unit
from apportion.study.settings import FULL, StudySettings


def verdicts(settings: StudySettings, comparisons: list[Comparison], finished: int, planned: int) -> tuple[str, ...]:
    """Describe which contenders differ from the reference and by how much, and which cannot be distinguished.

    Args:
        settings: The study's settings.
        comparisons: All of its comparisons.
        finished: Number of finished runs.
        planned: Number of planned runs.

    Returns:
        Sentences: one about the study, then one per comparison if there is more than one seed.
    """
    if settings.seeds == 1:
        return (_overall(settings, comparisons, finished, planned),)
    sentences = tuple(_sentence(one, settings) for one in comparisons)
    return (_overall(settings, comparisons, finished, planned), *sentences)


def _overall(settings: StudySettings, comparisons: list[Comparison], finished: int, planned: int) -> str:
    """Return the sentence about the study."""
    if finished < planned:
        return f"{finished} of {planned} runs are done: no verdict is given yet."
    if settings.seeds == 1:
        return "One seed: no verdict is given, for nothing tells a method from a lucky draw."
    if not comparisons:
        return "Nothing was compared."
    differ = [one for one in comparisons if one.differs]
    if not differ and all(one.smallest_effect is None for one in comparisons):
        return (
            f"No verdict is possible: {comparisons[0].runs} pairs of runs cannot reach the level of {settings.level:g} "
            f"in {_number(len(comparisons), 'comparison')}, however large the effect; more seeds or tasks could."
        )
    if not differ:
        return (
            f"The data cannot tell any contender from {settings.reference}, in "
            f"{_number(len(comparisons), 'comparison')} at a level of {settings.level:g}."
        )
    kinds = {True: "better", False: "worse"}
    parts = []
    for better, word in kinds.items():
        names = [f"{one.contender} at {_budget(one, settings)}" for one in differ if _is_better(one) is better]
        if names:
            parts.append(f"{word} than {settings.reference}: {', '.join(names)}")
    rest = len(comparisons) - len(differ)
    text = f"{len(differ)} of {len(comparisons)} comparisons with {settings.reference} show a difference ("
    return text + "; ".join(parts) + ")" + (f"; the data cannot tell the other {rest} apart." if rest else ".")


def _sentence(one: Comparison, settings: StudySettings) -> str:
    """Return the sentence about one comparison."""
    place = f"On {one.model}, at" if len(settings.models) > 1 else "At"
    start = f"{place} {_amount(one.budget, settings.unit)}"
    full = settings.contender(one.contender).method == FULL
    note = " (full fine-tuning, at no budget)" if full else ""
    if one.differs:
        size = Interval(
            estimate=abs(one.difference.estimate),
            low=min(abs(one.difference.low), abs(one.difference.high)),
            high=max(abs(one.difference.low), abs(one.difference.high)),
        )
        crosses = one.difference.low < 0 < one.difference.high
        low = -size.low if crosses else size.low
        found = _size(size.estimate, low, size.high, one, settings)
        return f"{start} {one.contender}{note} {found} {one.reference} (corrected p = {one.p_corrected:.2g})."
    seen = (
        "so few runs can show no difference at all"
        if one.smallest_effect is None
        else f"a difference of less than {_points(one.smallest_effect, one)} could not have been seen"
    )
    difference = one.difference
    return (
        f"{start} the data cannot tell {one.contender}{note} and {one.reference} apart: the difference is "
        f"{_points(difference.estimate, one)} ({_points(difference.low, one, bare=True)} to "
        f"{_points(difference.high, one, bare=True)}); {seen}."
    )


def _size(estimate: float, low: float, high: float, one: Comparison, settings: StudySettings) -> str:
    """Describe the size of a difference."""
    numbers = f"{_points(estimate, one)} ({_points(low, one, bare=True)} to {_points(high, one, bare=True)})"
    if settings.metric == "exact_match":
        return f"answered {numbers} {'more' if one.difference.estimate > 0 else 'fewer'} items than"
    return f"ended with a loss {numbers} {'higher' if one.difference.estimate > 0 else 'lower'} than"


def _points(value: float, one: Comparison, *, bare: bool = False) -> str:
    """Format percentage points of exact match, or nats of loss."""
    if one.metric == "exact_match":
        return f"{100 * value:.1f}" + ("" if bare else " points")
    return f"{value:.3f}" + ("" if bare else " nats")


def _is_better(one: Comparison) -> bool:
    """Return whether a difference is an improvement."""
    return (one.difference.estimate > 0) == (one.metric == "exact_match")


def _amount(budget: int, unit: Unit) -> str:
    """Format a budget with its unit."""
    return f"{budget:,} {unit if unit == 'parameters' else 'FLOPs per token'}"


def _budget(one: Comparison, settings: StudySettings) -> str:
    """Format a comparison's budget, with its model if there are several."""
    return f"{one.budget:,}" + (f" on {one.model}" if len(settings.models) > 1 else "")


def _number(count: int, noun: str) -> str:
    """Format a count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
