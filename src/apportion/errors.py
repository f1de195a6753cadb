"""The exception classes. Every user-facing error says what is wrong, where, and how to fix it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from typing import Any, Self, TypeAlias

_SHOWN = 3
_LENGTH = 60
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


Value: TypeAlias = str | os.PathLike[str] | list[str] | tuple[str, ...]


def shortened(text: str, length: int = _LENGTH) -> str:
    """Shorten a text that is too long for a message.

    Args:
        text: Text to show.
        length: Maximum number of characters.

    Returns:
        The text, or its first ``length`` characters and three dots.
    """
    return text if len(text) <= length else f"{text[:length]}..."


def printable(text: str, keep: str = "\n") -> str:
    r"""Escape the characters that a terminal would obey or cannot show.

    Args:
        text: Any text, such as a name from a file.
        keep: Characters that are not escaped.

    Returns:
        The text with control characters, separators of lines, marks that reverse the direction of text, and parts of
        undecodable names as escape sequences.

    Example:
        >>> printable("a[red]\x1b[31m")
        'a[red]\\x1b[31m'
    """
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] in keep else _escaped(match[0]), text)


def _escaped(character: str) -> str:
    """Write a character as Python's source code does."""
    return character.encode("unicode_escape").decode("ascii")


def lay_out(what: str, lines: Mapping[str, Value | None]) -> str:
    """Format a message: what is wrong, then one line per label, with aligned values.

    Args:
        what: The first line.
        lines: Values by label. None and empty values are skipped. Of a list, the first three are shown and the others
            counted.

    Returns:
        The message.

    Example:
        >>> print(lay_out("the folder is not empty.", {"found": ["a", "b", "c", "d"], "fix": "choose another one"}))
        the folder is not empty.
          found:  a, b, c and 1 more
          fix:    choose another one
    """
    shown = {label: text for label, value in lines.items() if value is not None and (text := printable(_text(value)))}
    what = printable(what, keep="")
    width = max(map(len, shown), default=0)
    for label, text in shown.items():
        start = f"  {label}:".ljust(width + 5)
        what += f"\n{start}{text.replace(chr(10), chr(10) + ' ' * len(start))}"
    return what


def _text(value: Value) -> str:
    """Format a value; of a list, the first three entries."""
    if isinstance(value, list | tuple):
        more = len(value) - _SHOWN
        return ", ".join(value[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
    return os.fspath(value)


class ApportionError(Exception):
    """Base of all errors that apportion raises. The command line prints the error and exits with code 2.

    `str` returns the first line, then one line per fact, with aligned values.

    Args:
        what: What is wrong, as a sentence.
        place: Where it is wrong, by name.
        found: The value found.
        expected: The value expected.
        fix: How to fix it.
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
        """Format the message."""
        facts = {"place": self.place, "expected": self.expected, "found": self.found}
        return lay_out(self.what, facts | self.details | {"fix": self.fix})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without calling the constructor: its arguments differ between the classes."""
        return _restore, (type(self), self.args, vars(self).copy())

    def within(self, context: str) -> Self:
        """Prepend a context to the first line.

        Args:
            context: The context, such as a task's name.

        Returns:
            A copy with the context.

        Example:
            >>> print(ApportionError("a row has no token.", fix="remove the row").within("task 'sums'"))
            task 'sums': a row has no token.
              fix:  remove the row
        """
        return self._changed(what=f"{context}: {self.what}")

    def at(self, place: str | os.PathLike[str]) -> Self:
        """Prepend a place to the error's place.

        Args:
            place: The outer place. If empty, the place does not change.

        Returns:
            A copy with the new place.
        """
        inner = "" if self.place is None else _text(self.place)
        return self._changed(place=": ".join(part for part in (os.fspath(place), inner) if part))

    def adding(self, *, fix: str | None = None, details: Mapping[str, Value] | None = None) -> Self:
        """Add another fix and more facts.

        Args:
            fix: Appended to the error's fix, if any.
            details: Facts by label.

        Returns:
            A copy with both.
        """
        own_fix = "" if self.fix is None else _text(self.fix)
        return self._changed(
            fix=", or ".join(part for part in (own_fix, fix) if part), details=self.details | dict(details or {})
        )

    def _changed(self, **fields: Any) -> Self:
        """Return a copy with the given fields replaced."""
        changed = copy.copy(self)
        vars(changed).update(fields)
        changed.args = (changed.what,)
        return changed


def _restore(kind: type[ApportionError], args: tuple[Any, ...], fields: dict[str, Any]) -> ApportionError:
    """Rebuild a pickled error."""
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(fields)
    return error


class ApportionWarning(UserWarning):
    """Something is allowed but probably not intended."""


class ConfigurationError(ApportionError, ValueError):
    """An argument, an option or a model's configuration is invalid."""


class ProfileError(ApportionError, ValueError):
    """A profile is damaged, lacks required data, or was made for something else."""


class PlanError(ApportionError, ValueError):
    """A plan is damaged or cannot be built."""


class PlanMismatchError(PlanError):
    """A plan, a profile or an adapter belongs to another model."""


class AdapterError(ApportionError, ValueError):
    """An adapter's file is damaged, incomplete or modified, or contains invalid numbers."""


class DataError(ApportionError, ValueError):
    """A data set cannot be found, read or used."""


class OutputExistsError(ApportionError, FileExistsError):
    """An output already exists and would be overwritten."""


class OutputPathError(ApportionError, OSError):
    """The output path is not writable."""


class OutputWriteError(ApportionError, OSError):
    """Writing an output failed, for example because the disk is full."""


class FolderInUseError(ApportionError, BlockingIOError):
    """Another process is writing to the folder."""


class TrainingError(ApportionError, RuntimeError):
    """Training cannot continue, for example because the loss is NaN."""


class ModelLoadError(ApportionError, OSError):
    """A model cannot be found or read."""


class MissingDependencyError(ApportionError, ImportError):
    """An optional package is not installed.

    Args:
        purpose: What the package is needed for.
        package: Its name on PyPI.
        extra: The extra of apportion that installs it.
    """

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(f"{purpose} need the package {package}.", fix=f"pip install 'apportion[{extra}]'")
        self.purpose, self.package, self.extra = purpose, package, extra
