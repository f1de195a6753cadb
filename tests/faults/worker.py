"""Reads mutants in a process with little memory and little time for each, and prints what became of them."""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import torch

from apportion.errors import ApportionError
from faults.kind import Kind, restore
from faults.kinds import all_kinds
from faults.limits import MEMORY_BYTES, MUTANT_S, PER_ROUND

_MOST_CHARS = 3000


class HangError(BaseException):
    """A mutant took too long."""


def main(folder: Path, seed: int, per_kind: int | None, skipped: list[str]) -> None:
    """Read the mutants of all kinds; print one line of JSON for each mutant that is begun and ended."""
    for kind in _prepared(folder, len(skipped)):
        if kind.name not in skipped:
            _fuzz(kind, folder, seed, range(per_kind or kind.mutants))


def go_on(folder: Path, seed: int, first_round: int, seconds: float) -> None:
    """Read a few mutants of every kind in each round, until the time is over."""
    end = time.monotonic() + seconds
    kinds = _prepared(folder, first_round)
    number = first_round
    while number == first_round or time.monotonic() < end:
        for kind in kinds:
            _fuzz(kind, folder, seed, range(number * PER_ROUND, (number + 1) * PER_ROUND))
        number += 1


def _prepared(folder: Path, start: int) -> list[Kind]:
    """Limit the process, and make a good file of every kind."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, _hang)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place = folder / f"good-{start}"
    place.mkdir()
    kinds = all_kinds(place)
    print(json.dumps({"kinds": [kind.name for kind in kinds]}), flush=True)
    return kinds


def _fuzz(kind: Kind, folder: Path, seed: int, numbers: Iterable[int]) -> None:
    """Read the mutants of one kind, each in place of the good file."""
    good = kind.path.read_bytes()
    expected = kind.read()
    assert kind.read() == expected, f"{kind.name} cannot be compared"
    for number in numbers:
        draw = Random(f"{seed}/{kind.name}/{number}")
        mutation = draw.choice(kind.mutations)
        mutant = mutation(draw, good)
        facts = {"kind": kind.name, "number": number, "mutation": mutation.__name__}
        saved = folder / "mutants" / f"{kind.name}-{number}{kind.path.suffix}".replace(" ", "_")
        saved.parent.mkdir(exist_ok=True)
        saved.write_bytes(mutant)
        restore(kind, mutant)
        print(json.dumps(facts | {"outcome": "begun"}), flush=True)
        outcome, words = _outcome(kind, expected)
        if outcome in {"same", "refused", "other"}:
            saved.unlink()
        print(json.dumps(facts | {"outcome": outcome, "words": words}), flush=True)
    restore(kind, good)


def _outcome(kind: Kind, expected: Any) -> tuple[str, str]:
    """Read the file in its place, and judge what comes of it."""
    signal.alarm(MUTANT_S)
    try:
        contents = kind.read()
        wrong = None if contents == expected else kind.judge(contents)
    except ApportionError as error:
        return _judged(kind, str(error))
    except HangError:
        return "crash", f"no answer within {MUTANT_S} s"
    except BaseException as error:  # noqa: BLE001 - a crash is any other exception
        return "crash", f"{type(error).__name__}: {error}"[:400]
    finally:
        signal.alarm(0)
    if contents == expected:
        return "same", ""
    return ("accepted", wrong) if wrong else ("other", "")


def _judged(kind: Kind, message: str) -> tuple[str, str]:
    """Tell a refusal that helps from one that does not."""
    try:
        message.encode()
    except UnicodeEncodeError:
        return "unclear", f"a message that no terminal can show: {message!a}"[:400]
    if (kind.named or kind.path.name) not in message:
        return "unclear", f"a message that does not name the file: {message}"[:400]
    if len(message) > _MOST_CHARS:
        return "unclear", f"a message of {len(message)} characters: {message[:400]}"
    return "refused", message[:400]


def _hang(_number: int, _frame: FrameType | None) -> None:
    raise HangError


if __name__ == "__main__":
    if sys.argv[1] == "rounds":
        go_on(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) or None, json.loads(sys.argv[4]))
