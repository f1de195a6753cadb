"""The exception tree: every user-facing error says what is wrong, where, and what mends it."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any, Self, TypeAlias

_SHOWN = 3

Value: TypeAlias = str | os.PathLike[str] | list[str] | tuple[str, ...]


_LENGTH = 60


def shortened(text: str, length: int = _LENGTH) -> str:
    """Give a text, or its beginning where it is too long for a message.

    Args:
        text: What was found, as a user would know it again.
        length: Characters to show.

    Returns:
        The text, or its beginning and three dots.
    """
    return text if len(text) <= length else f"{text[:length]}..."


def lay_out(what: str, lines: Mapping[str, Value | None]) -> str:
    """Lay out a message: what is wrong, then one line per label, with the values aligned.

    Args:
        what: The first line.
        lines: Values by label; those that are None or empty are left out. Of a list, three are shown and the others
            counted.

    Returns:
        The message.

    Example:
        >>> print(lay_out("the folder is not empty.", {"found": ["a", "b", "c", "d"], "fix": "choose another one"}))
        the folder is not empty.
          found:  a, b, c and 1 more
          fix:    choose another one
    """
    shown = {label: text for label, value in lines.items() if value is not None and (text := _text(value))}
    width = max(map(len, shown), default=0)
    for label, text in shown.items():
        start = f"  {label}:".ljust(width + 5)
        what += f"\n{start}{text.replace(chr(10), chr(10) + ' ' * len(start))}"
    return what


def _text(value: Value) -> str:
    """Show a value, and of a list at most three."""
    if isinstance(value, list | tuple):
        more = len(value) - _SHOWN
        return ", ".join(value[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
    return os.fspath(value)


class ApportionError(Exception):
    """Base of every error that apportion raises on purpose; the command line prints it and exits with code 2.

    `str` gives the first line and under it a line per fact, with the values aligned.

    Args:
        what: What is wrong, as a sentence.
        place: Where, by name.
        found: What is there.
        expected: What should be there.
        fix: What the user can do.
        details: Other facts by label, shown before `fix`.

    Example:
        >>> print(ApportionError("hot=65 asks for more experts than a layer has.", found="64", fix="give at most 64"))
        hot=65 asks for more experts than a layer has.
          found:  64
          fix:    give at most 64
    """

    def __init__(
        self,
        what: str,
        *,
        place: Value | None = None,
        found: Value | None = None,
        expected: Value | None = None,
        fix: Value | None = None,
        details: Mapping[str, Value] | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.place = place
        self.expected = expected
        self.found = found
        self.details = dict(details or {})
        self.fix = fix

    def __str__(self) -> str:
        """Lay out the message."""
        facts = {"place": self.place, "expected": self.expected, "found": self.found}
        return lay_out(self.what, facts | self.details | {"fix": self.fix})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the constructor, whose arguments differ between the classes."""
        return _restore, (type(self), self.args, vars(self).copy())

    def within(self, context: str) -> Self:
        """Say in the first line what was being done.

        Args:
            context: For example a task's name.

        Returns:
            A copy whose first line begins with the context.

        Example:
            >>> print(ApportionError("a row has no token.", fix="leave it out").within("task 'sums'"))
            task 'sums': a row has no token.
              fix:  leave it out
        """
        return self._changed(what=f"{context}: {self.what}")

    def at(self, place: str | os.PathLike[str]) -> Self:
        """Say where it happened.

        Args:
            place: The place; of several, the outer one. Nothing changes where it is empty.

        Returns:
            A copy with the place, and the error's own place after it.
        """
        inner = "" if self.place is None else _text(self.place)
        return self._changed(place=": ".join(part for part in (os.fspath(place), inner) if part))

    def adding(self, *, fix: str | None = None, details: Mapping[str, Value] | None = None) -> Self:
        """Add another way out, and other facts.

        Args:
            fix: Shown after the error's own, where it has one.
            details: Facts by label.

        Returns:
            A copy with both.
        """
        own = "" if self.fix is None else _text(self.fix)
        return self._changed(
            fix=", or ".join(part for part in (own, fix) if part), details=self.details | dict(details or {})
        )

    def _changed(self, **fields: Any) -> Self:
        """Copy the error with other fields."""
        changed = copy.copy(self)
        vars(changed).update(fields)
        changed.args = (changed.what,)
        return changed


def _restore(kind: type[ApportionError], args: tuple[Any, ...], fields: dict[str, Any]) -> ApportionError:
    """Make an error again from what pickling kept of it."""
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(fields)
    return error


class ApportionWarning(UserWarning):
    """Something is allowed, and probably not what was meant."""


class ConfigurationError(ApportionError, ValueError):
    """An argument, an option or a model's configuration is wrong."""


class ProfileError(ApportionError, ValueError):
    """A profile is damaged, empty where it must not be, or was made for something else."""


class PlanError(ApportionError, ValueError):
    """A plan is damaged or asks for something that cannot be built."""


class PlanMismatchError(PlanError):
    """A plan, a profile or an adapter belongs to another model."""


class AdapterError(ApportionError, ValueError):
    """An adapter's file is damaged, incomplete or was changed, or holds numbers that no model can use."""


class DataError(ApportionError, ValueError):
    """A data set cannot be found, read or used."""


class OutputExistsError(ApportionError, FileExistsError):
    """An output is already there and would be overwritten."""


class OutputPathError(ApportionError, OSError):
    """Nothing can be written where an output belongs."""


class OutputWriteError(ApportionError, OSError):
    """An output could not be written although its place was a good one, for example because the disk is full."""


class FolderInUseError(ApportionError, BlockingIOError):
    """Another process writes to a folder."""


class TrainingError(ApportionError, RuntimeError):
    """Training cannot go on, for example because the loss is not a number."""


class ModelLoadError(ApportionError, OSError):
    """A model cannot be found or read."""


class MissingDependencyError(ApportionError, ImportError):
    """An optional package is not installed.

    Args:
        purpose: What the package is needed for.
        package: Its name on PyPI.
        extra: The extra of apportion that brings it.
    """

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(f"{purpose} need the package {package}.", fix=f"pip install 'apportion[{extra}]'")
        self.purpose, self.package, self.extra = purpose, package, extra
