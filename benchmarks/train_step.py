"""One training step: attention only, PEFT on all experts, and this package on all, a quarter and an eighth.

    python benchmarks/train_step.py [--repeats 7] [--quick]

The floor is attention-only LoRA with transformers' own experts: the same passes through frozen experts. All contenders
start from one model and run alternately; ratios are medians over rounds. Each setting and each peak of memory is
measured in a separate process. Last, the number of experts grows at a fixed number of experts per token. Written to
build/benchmarks/train_step.json; about 13 minutes on two cores, 6 with --quick.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from typing import Any

import torch
from common import (
    ALL,
    EIGHTH,
    FLOOR,
    LAYERS,
    PEFT,
    QUARTER,
    RANK,
    TOP_K,
    adapt,
    alternate,
    build,
    copies,
    in_fresh_process,
    peak_above,
    save,
    show,
    step,
    summed_up,
    token_ids,
)
from torch import nn

EVERY = (FLOOR, EIGHTH, QUARTER, ALL, PEFT)
BASE, GROWING = "base model", (FLOOR, EIGHTH, PEFT)
GROWN_LAYERS, GROWN_EXPERTS = 2, (16, 64, 256)


def times(dtype: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Time every contender in this process."""
    models = copies(build(getattr(torch, dtype)), EVERY)
    ids = token_ids(4, tokens // 4)
    rows = summed_up(alternate({name: partial(step, model, ids) for name, model in models.items()}, repeats), FLOOR)
    for name, model in models.items():
        rows[name]["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return rows


def peak(dtype: str, tokens: int, contender: str) -> int:
    """Return the peak memory of a later step of one contender above its model, including gradients of factors."""
    model = adapt(build(getattr(torch, dtype)), contender)
    model.train()
    for _ in range(2):  # what the first passes allocate for good is no step's own
        step(model, token_ids(4, tokens // 4))
    return peak_above(lambda: step(model, token_ids(4, tokens // 4)))


def growth(repeats: int) -> dict[int, dict[str, Any]]:
    """Time a step of shallow models with increasing numbers of experts, and the base model's forward pass."""
    ids = token_ids(4, 128)

    def forward(base: nn.Module) -> None:
        with torch.no_grad():
            base(input_ids=ids)

    runs: dict[tuple[int, str], Any] = {}
    for experts in GROWN_EXPERTS:
        base = build(experts=experts, layers=GROWN_LAYERS)
        runs[experts, BASE] = partial(forward, base)
        models = copies(base, GROWING)
        runs |= {(experts, name): partial(step, model, ids) for name, model in models.items()}
    times = alternate(runs, repeats)
    grown: dict[int, dict[str, Any]] = {experts: {} for experts in GROWN_EXPERTS}
    for (experts, name), own in times.items():
        first = times[GROWN_EXPERTS[0], name]
        growths = [one / other for one, other in zip(own, first, strict=True)]
        grown[experts][name] = {
            "median_s": statistics.median(own),
            "growth": statistics.median(growths),
            "all_s": own,
        }
    return grown


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="rounds; 7, or 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="only 512 tokens, fewer rounds")
    parser.add_argument("--one", help="measure one setting, given as JSON, and print JSON")
    args = parser.parse_args()
    if args.one:
        setting = json.loads(args.one)
        run = {"times": times, "peak": peak, "growth": growth}[setting.pop("measure")]
        print(json.dumps(run(**setting)))
        return
    repeats = args.repeats or (3 if args.quick else 7)
    one = partial(in_fresh_process, __file__, "--one")
    cases: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        for tokens, threads in [(512, 2), (512, 1)] if args.quick else [(512, 2), (512, 1), (2048, 2)]:
            rounds = repeats if tokens == 512 else max(3, repeats // 2)
            setting = {"measure": "times", "dtype": dtype, "tokens": tokens, "repeats": rounds}
            rows = one(json.dumps(setting), threads=threads)
            for name, row in rows.items():
                if threads == 2:
                    peaked = {"measure": "peak", "dtype": dtype, "tokens": tokens, "contender": name}
                    row["peak_above_model_bytes"] = one(json.dumps(peaked))
            cases.append({"dtype": dtype, "tokens": tokens, "threads": threads, "contenders": rows})
            show(
                f"one step, {dtype}, {tokens} tokens, threads: {threads}",
                rows,
                {
                    "median ms": lambda r: f"{r['median_s'] * 1000:,.0f}",
                    "x floor": lambda r: f"{r['ratio']:.2f}",
                    "memory MB": lambda r: f"{r.get('peak_above_model_bytes', 0) / 1e6:,.0f}",
                    "trainable": lambda r: f"{r['trainable_parameters']:,}",
                },
            )
    grown = one(json.dumps({"measure": "growth", "repeats": repeats}))
    for experts, rows in grown.items():
        columns = {
            "median ms": lambda r: f"{r['median_s'] * 1000:,.0f}",
            f"x {GROWN_EXPERTS[0]} experts": lambda r: f"{r['growth']:.2f}",
        }
        show(f"{experts} experts", rows, columns)
    save(
        "train_step",
        {
            "model": f"{LAYERS} layers, width 512, 64 experts of 256, top-{TOP_K}, rank {RANK}",
            "cases": cases,
            "growth": {"layers": GROWN_LAYERS, "tokens": 512, "threads": 2, "dtype": "float32", "experts": grown},
        },
    )


if __name__ == "__main__":
    main()
