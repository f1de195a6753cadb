"""Run a command's module, and turn errors into one message and an exit code."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import sys
import warnings
from typing import Any, NoReturn

import typer

from apportion.cli.terminal import Terminal
from apportion.errors import ApportionError, ApportionWarning, OutputWriteError, lay_out
from apportion.records.files import is_full
from apportion.signals import Terminated, raising_terminated

# Loggers that report missing optional kernels at import.
_NOISY_LOGGERS = ("bitsandbytes", "torchao", "torch.utils._pytree")
_NOT_PERMITTED = (errno.EROFS, errno.EACCES, errno.EPERM)


def given(**options: Any) -> dict[str, Any]:
    """Return the options that the user gave.

    Args:
        **options: Options; None if not given.

    Returns:
        The options that are not None.
    """
    return {name: value for name, value in options.items() if value is not None}


def run(command: str, *, as_json: bool, **arguments: Any) -> None:
    """Import a command's module, run it, and turn errors into one message and an exit code.

    Args:
        command: Name of the command's module.
        as_json: Print the result as one JSON object on standard output, and everything else on standard error.
        **arguments: Fields of the module's `Arguments`.

    Raises:
        Exit: the command failed; the message has been printed.
    """
    first = os.environ.get("RANK", "0") == "0"  # under torchrun, only rank 0 prints
    console = Terminal(stderr=as_json, quiet=not first)
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with raising_terminated(), warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            warnings.filterwarnings("always", category=ApportionWarning)
            module = importlib.import_module(f"apportion.cli.{command}")
            result = module.run(console, module.Arguments(**arguments))
    except ApportionError as error:
        _fail(str(error), 1 if isinstance(error, OutputWriteError) else 2)
    except KeyboardInterrupt:
        _fail("interrupted.", 1)
    except Terminated as ended:
        _fail("terminated.", ended.exit_code)
    except Exception as error:
        place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        if isinstance(error, OSError) and error.errno in _NOT_PERMITTED:
            fix = "choose another location, or change its permissions"
            _fail(lay_out(f"{place}{error.strerror}.", {"fix": fix}), 1)
        if is_full(error):
            _fail(lay_out(f"{place}the disk is full.", {"fix": "free disk space, then run the command again"}), 1)
        raise
    if as_json and first:
        sys.stdout.write(json.dumps(result) + "\n")


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Print apportion's warnings as messages, and others in Python's format."""
    if issubclass(category, ApportionWarning):
        Terminal(stderr=True).say("warning:", "bold yellow", str(message))
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *place[:2]))


def _fail(message: str, code: int) -> NoReturn:
    """Print one message on standard error and exit."""
    Terminal(stderr=True).say("error:", "bold red", message)
    raise typer.Exit(code)
