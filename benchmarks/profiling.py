"""Profiling compared with a plain forward pass over the same batches, sorted by length.

    python benchmarks/profiling.py [--repeats 7]

Written to build/benchmarks/profiling.json.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from common import VOCABULARY, alternate, build, in_fresh_process, save, show, summed_up

import apportion
from apportion.data.batches import Encoded, batches

PLAIN, PROFILED = "plain forward pass", "apportion.profile"
ROWS, BATCH = 96, 8


def calibration_batches() -> list[dict[str, torch.Tensor]]:
    """Make rows of 16 to 128 tokens, and pad them only to the length of their batch."""
    draw = torch.Generator().manual_seed(2)
    lengths = torch.randint(16, 129, (ROWS,), generator=draw).tolist()
    rows = [torch.randint(2, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]
    encoded = [Encoded(ids, num_prompt=0) for ids in rows]
    return list(batches(encoded, 0, BATCH))


def measure(dtype: str, repeats: int) -> dict[str, Any]:
    """Time both in this process."""
    model, data = build(getattr(torch, dtype)).eval(), calibration_batches()

    @torch.no_grad()
    def plain() -> None:
        for batch in data:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    rows = summed_up(alternate({PLAIN: plain, PROFILED: lambda: apportion.profile(model, data)}, repeats), PLAIN)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in data)
    for row in rows.values():
        row["tokens_per_s"] = tokens / row["median_s"]
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--one", choices=["float32", "bfloat16"], help="measure one type, and print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.repeats)))
        return
    cases = []
    for dtype in ("float32", "bfloat16"):
        for threads in (1, 2):
            rows = in_fresh_process(__file__, "--one", dtype, "--repeats", args.repeats, threads=threads)
            cases.append({"dtype": dtype, "threads": threads, "contenders": rows})
            show(
                f"profiling, {dtype}, threads: {threads}",
                rows,
                {"tokens a second": lambda r: f"{r['tokens_per_s']:,.0f}", "x plain": lambda r: f"{r['ratio']:.3f}"},
            )
    save("profiling", {"rows": ROWS, "batch_size": BATCH, "cases": cases})


if __name__ == "__main__":
    main()
