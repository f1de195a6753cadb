"""Two versions of the package side by side: training, decoding and profiling, alternating in one run.

    python benchmarks/paired.py OLD [--rounds 20] [--dtype float32 bfloat16] [--threads 1]

OLD is a commit of this repository; the other version is the working tree. Each version has a process of its own, which
stays alive and waits; the two take turns, and the one that starts a round changes from round to round. For each
measurement the result is the mean of the rounds' ratios new/old (of their logarithms) with a 95 % interval; below 1 the
working tree is faster. Written to build/benchmarks/paired.json.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from common import EIGHTH, adapt, build, save, show, step, token_ids
from decode import decode
from profiling import calibration_batches

import apportion

ROOT = Path(__file__).resolve().parents[1]
MEASUREMENTS = ("train_step", "decode", "profiling")


def workload(measurement: str, dtype: str) -> Callable[[], object]:
    """Make what one round runs."""
    base = build(getattr(torch, dtype))
    if measurement == "profiling":
        data = calibration_batches()[:4]
        return lambda: apportion.profile(base.eval(), data)
    model = adapt(base, EIGHTH)
    if measurement == "decode":
        return lambda: decode(model.eval(), 16)
    ids = token_ids(2, 256)
    return lambda: step(model, ids)


def wait_and_run(measurement: str, dtype: str, threads: int) -> None:
    """Warm up, then run one round for each line on standard input, and print its seconds."""
    torch.set_num_threads(threads)
    run = workload(measurement, dtype)
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


@contextmanager
def version_at(source: Path, arguments: list[str]) -> Iterator[Callable[[], float]]:
    """Start a process with one version of the package; what is given runs a round in it and returns its seconds."""
    command = [sys.executable, __file__, "--worker", *arguments]
    environment = os.environ | {"PYTHONPATH": str(source)}
    with subprocess.Popen(  # noqa: S603
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        requests: Any = process.stdin
        answers: Any = process.stdout

        def round_s() -> float:
            requests.write("\n")
            requests.flush()
            return float(answers.readline())

        try:
            if answers.readline() != "ready\n":
                raise RuntimeError(f"the version in {source} did not start")
            yield round_s
        finally:
            process.kill()


def ratio(pairs: list[tuple[float, float]]) -> dict[str, object]:
    """Sum up pairs of seconds, new and old: the mean ratio and its 95 % interval (normal, over logarithms)."""
    logs = [math.log(new / old) for new, old in pairs]
    mean, half = statistics.mean(logs), 1.96 * statistics.stdev(logs) / math.sqrt(len(logs))
    return {
        "ratio": math.exp(mean),
        "interval": [math.exp(mean - half), math.exp(mean + half)],
        "new_median_s": statistics.median(new for new, _ in pairs),
        "old_median_s": statistics.median(old for _, old in pairs),
        "pairs_s": pairs,
    }


def compare(old: Path, measurement: str, dtype: str, threads: int, rounds: int) -> dict[str, object]:
    """Let both versions take turns at one measurement."""
    arguments = [measurement, dtype, str(threads)]
    with ExitStack() as stack:
        new_s = stack.enter_context(version_at(ROOT / "src", arguments))
        old_s = stack.enter_context(version_at(old / "src", arguments))
        pairs = []
        for number in range(rounds):
            first, second = (new_s, old_s) if number % 2 else (old_s, new_s)
            times = {first: first(), second: second()}
            pairs.append((times[new_s], times[old_s]))
    return ratio(pairs)


def main() -> None:
    """Measure, print and write."""
    if "--worker" in sys.argv:
        measurement, dtype, threads = sys.argv[sys.argv.index("--worker") + 1 :]
        wait_and_run(measurement, dtype, int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder, "old")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(old), args.old], check=True)  # noqa: S603
        try:
            for dtype in args.dtype:
                for name in MEASUREMENTS:
                    rows[f"{name}, {dtype}"] = compare(old, name, dtype, args.threads, args.rounds)
        finally:
            subprocess.run([*git, "remove", "--force", str(old)], check=True)  # noqa: S603
    columns = {
        "new ms": lambda r: f"{r['new_median_s'] * 1000:,.0f}",
        "old ms": lambda r: f"{r['old_median_s'] * 1000:,.0f}",
        "new / old": lambda r: f"{r['ratio']:.3f}",
        "95 %": lambda r: f"{r['interval'][0]:.3f} to {r['interval'][1]:.3f}",
    }
    show(f"working tree against {args.old}, {args.rounds} rounds, threads: {args.threads}", rows, columns)
    save("paired", {"old": args.old, "rounds": args.rounds, "threads": args.threads, "rows": rows})


if __name__ == "__main__":
    main()
