"""Damage files and kill writers for a given time; ends with exit code 1 if anything goes wrong.

python tests/faults/campaign.py --seconds 1200 --seed 0 --page docs/reliability.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1])]
from faults.limits import MEMORY_BYTES, MUTANT_S, PER_ROUND  # noqa: E402

HERE = Path(__file__).parent
MUTANTS_SHARE = 0.55
DEFECTS = {"crash", "accepted", "unclear", "defect"}

PAGE = """# Reliability

<!-- written by tests/faults/campaign.py -->
`make faults SECONDS=N SEED=S` damages files and kills writers for N seconds, writes this page, and ends with exit
code 1 if it finds a defect. The last campaign had seed {seed} and {seconds} seconds, in which it came to the counts
below. A mutant depends only on the seed, the kind of its file and its number, so each can be made again. The tests run
a small part of the campaign.

## Damaged files

A good file of each kind is changed: bits and bytes, whole values of its JSON, tensors, or values under a hash that was
computed again. Then it is read as the commands read it. *Same*: it was read with its old contents. *Refused*: one error
of this package, which names the file. *Possible*: it was read with other contents that such a file can hold; for files
under a hash this is a defect. All else is a defect: another exception, no answer within {mutant_s} seconds, more than
{memory_gb} GB of memory, impossible contents, or a message that does not name the file.

{files}

## Killed writers

Every writer is killed (SIGKILL) once or twice at a random moment, then started again. *Absent*, *whole* and *refused*
say what was there after the last kill; *ended*: the writer was faster. It is a defect if an output is half written and
accepted, if the result differs from that without a kill, if the next writer fails, or if temporary files stay.
`save_pretrained` is PEFT's and writes file by file, so the adapter of a killed one may be refused by `load`.

{kills}

## Full disks

Every writer may write files only up to a random size. *Refused*: one error that names the output. Another error is a
defect, and so is an output that is half written and accepted.

{limits}

## Pickles

Every file that `train --resume` and `load` read is replaced by pickles that would make a folder, with the checkpoint's
list of files sealed again. In {pickles} attempts, none may run.
"""


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description="Damage files and kill writers for a given time.")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        lines = [*_mutants(Path(folder), args.seed, args.seconds * MUTANTS_SHARE)]
        lines += kills(Path(folder), args.seed, args.seconds * (1 - MUTANTS_SHARE), "slow")
        lines += kills(Path(folder), args.seed, 0, "pickles")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines:
        counts[line["kind"]][line["outcome"]] += 1
    for kind, outcomes in counts.items():
        print(f"{kind:42} {', '.join(f'{name} {count}' for name, count in sorted(outcomes.items()))}")
    defects = [line for line in lines if line["outcome"] in DEFECTS]
    for line in defects[:50]:
        print(f"DEFECT {line['kind']}, seed {args.seed}, number {line['number']}: {line['words'][:600]}")
    print(f"{len(lines)} attempts, {len(defects)} defects")
    if args.page:
        args.page.write_text(_page(counts, args.seed, args.seconds))
    sys.exit(1 if defects else 0)


def _mutants(folder: Path, seed: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Read mutants in a process, which is started again after a crash."""
    end, start = time.monotonic() + seconds, 0
    while start == 0 or time.monotonic() < end:
        left = max(1.0, end - time.monotonic())
        lines, code = _run([str(HERE / "worker.py"), "rounds", str(folder), str(seed), str(start), str(left)], left)
        ended = [line for line in lines if line.get("outcome") not in (None, "begun")]
        yield from ended
        if code == 0:
            return
        last = lines[-1] if lines else {"kind": "all", "number": 0}
        yield {"kind": last.get("kind", "all"), "number": last.get("number", 0), "outcome": "crash", "words": str(code)}
        start = last.get("number", 0) // PER_ROUND + 1


def kills(folder: Path, seed: int, seconds: float, mode: str) -> list[dict[str, Any]]:
    """Kill writers, or try pickles, in a process.

    Args:
        folder: An empty folder.
        seed: Seed of the moments.
        seconds: How long.
        mode: ``quick``, ``slow`` or ``pickles``.

    Returns:
        What became of each attempt.
    """
    place = folder / mode
    place.mkdir()
    lines, code = _run([str(HERE / "kill_worker.py"), str(place), str(seed), str(seconds), mode], seconds)
    ended = {"kind": mode, "number": 0, "outcome": "defect", "words": f"the campaign's own process ended: {code}"}
    return lines if code == 0 else [*lines, ended]


def _run(command: list[str], seconds: float) -> tuple[list[dict[str, Any]], object]:
    """Run one process, and return the lines that it printed and its end."""
    paths = [str(HERE.parent), str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as log:
        settings |= {"PYTHONPATH": os.pathsep.join(paths), "APPORTION_CACHE": cache}
        try:
            done = subprocess.run(
                [sys.executable, *command], env=os.environ | settings, stdout=log, stderr=subprocess.PIPE, text=True,
                timeout=seconds + 600, check=False,
            )  # fmt: skip
            code: object = done.returncode if done.returncode == 0 else f"{done.returncode}: {done.stderr[-500:]}"
        except subprocess.TimeoutExpired as error:
            code = error
        log.seek(0)
        return [json.loads(line) for line in log.read().splitlines() if line.endswith("}")], code


def _page(counts: dict[str, Counter[str]], seed: int, seconds: float) -> str:
    """Write the page."""
    names = {end: [kind for kind in counts if kind.endswith(end)] for end in (": kill", ": limit")}
    pickles = [kind for kind in counts if kind.startswith("pickle: ") and kind != "pickle: unpickled"]
    others = {*names[": kill"], *names[": limit"], *pickles, "pickle: unpickled"}
    files = [kind for kind in counts if kind not in others]
    return PAGE.format(
        seed=seed,
        seconds=f"{seconds:g}",
        mutant_s=MUTANT_S,
        memory_gb=MEMORY_BYTES // 2**30,
        files=_table(counts, files, {"same": "same", "refused": "refused", "possible": "other"}),
        kills=_table(counts, names[": kill"], {name: name for name in ("absent", "whole", "refused", "ended")}),
        limits=_table(counts, names[": limit"], {name: name for name in ("refused", "ended")}),
        pickles=sum(sum(counts[kind].values()) for kind in pickles),
    )


def _table(counts: dict[str, Counter[str]], kinds: list[str], columns: dict[str, str]) -> str:
    """Write one table, with its sum."""
    lines = [f"| | {' | '.join(columns)} | defects |", f"| --- |{' ---: |' * (len(columns) + 1)}"]
    total = sum((counts[kind] for kind in kinds), Counter[str]())
    for name, of_kind in [*((kind.rpartition(": ")[0] or kind, counts[kind]) for kind in kinds), ("all", total)]:
        numbers = [*(of_kind[outcome] for outcome in columns.values()), sum(of_kind[one] for one in DEFECTS)]
        lines.append(f"| {name} | {' | '.join(f'{number:,}' for number in numbers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
