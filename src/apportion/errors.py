"""The exception tree: every user-facing error says what is wrong, where, and what mends it."""

from __future__ import annotations

_SHOWN = 60


def shortened(text: str, length: int = _SHOWN) -> str:
    """Give a text, or its beginning where it is too long for a message.

    Args:
        text: What was found, as a user would know it again.
        length: Characters to show.

    Returns:
        The text, or its beginning and three dots.
    """
    return text if len(text) <= length else f"{text[:length]}..."


class ApportionError(Exception):
    """Base of every error that apportion raises on purpose; the command line prints it and exits with code 2."""


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
        super().__init__(purpose, package, extra)
        self.purpose, self.package, self.extra = purpose, package, extra

    def __str__(self) -> str:
        """Say what is missing and how to install it."""
        return f"{self.purpose} need the package {self.package}.\n  fix:  pip install 'apportion[{self.extra}]'"
