"""Run a command's module, and turn what goes wrong into one message and an exit code."""

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
from rich.console import Console

from apportion.errors import ApportionError, ApportionWarning, OutputWriteError, lay_out
from apportion.records.files import is_full
from apportion.signals import Terminated, raising_terminated

# Libraries that say at import, to everyone who has them installed, which of their optional kernels are missing.
_CHATTER = ("bitsandbytes", "torchao", "torch.utils._pytree")
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def given(**options: Any) -> dict[str, Any]:
    """Keep the options that the user gave.

    Args:
        **options: Options, None where they were not given.

    Returns:
        The others.
    """
    return {name: value for name, value in options.items() if value is not None}


def run(command: str, *, as_json: bool, **arguments: Any) -> None:
    """Load a command's module, run it, and turn what goes wrong into one message and an exit code.

    Args:
        command: The command's name, which is its module's.
        as_json: Print what it returns as one JSON object on standard output, and everything else on standard error.
        **arguments: The fields of its module's `Arguments`.

    Raises:
        Exit: with the code, after the message.
    """
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, one speaks
    console = Console(stderr=as_json, highlight=False, quiet=not first)
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        with raising_terminated():
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
        if isinstance(error, OSError) and error.errno in _REFUSED:
            fix = "choose another place, or change what may be written there"
            _fail(lay_out(f"{place}{error.strerror}.", {"fix": fix}), 1)
        if is_full(error):
            _fail(lay_out(f"{place}the disk is full.", {"fix": "make room, then run it again"}), 1)
        raise
    if as_json and first:
        sys.stdout.write(json.dumps(result) + "\n")


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Print our own warnings as messages, and others as Python does."""
    if issubclass(category, ApportionWarning):
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold yellow]warning:[/] {_plain(str(message))}")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *place[:2]))


def _fail(message: str, code: int) -> NoReturn:
    """Print one message on standard error and exit."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {_plain(message)}")
    raise typer.Exit(code)


def _plain(text: str) -> str:
    """Keep Rich from reading brackets as markup."""
    return text.replace("[", r"\[")
