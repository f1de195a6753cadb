"""Where the time of one training step goes: operations and bytes counted, and time by kind of work.

    python benchmarks/breakdown.py [--threads 2]

Counted: the multiply-adds of every product (two operations each), and the bytes of experts' weights that a forward and a
backward pass read. Measured: times of PyTorch's profiler, scaled to the step's unprofiled median.
Written to build/benchmarks/breakdown.json.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from common import (
    ALL,
    EIGHTH,
    EXPERT_WIDTH,
    FLOOR,
    LAYERS,
    TOP_K,
    VOCABULARY,
    WIDTH,
    alternate,
    build,
    copies,
    save,
    show,
    step,
    token_ids,
)
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "products": (
        "aten::mm",
        "aten::addmm",
        "aten::addmm_",
        "aten::baddbmm_",
        "aten::bmm",
        "aten::_grouped_mm",
        "mkldnn::_linear_pointwise",
    ),
    "attention": ("flash_attention",),
    "gathers and scatters": ("index", "embedding_bag", "gather", "scatter", "sort", "bincount", "histc"),
    "elementwise": ("silu", "aten::mul", "aten::add", "aten::sum", "aten::div", "vecdot", "softmax", "pow", "rsqrt"),
    "copies and fills": ("copy_", "aten::cat", "fill_", "zero_", "_to_copy", "clone"),
}


def kind_of(name: str) -> str:
    """Return an operation's kind."""
    if name in KINDS["products"]:
        return "products"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "everything else")


def counted(tokens: int, experts: int = 64, itemsize: int = 4) -> dict[str, float]:
    """Count the floor's operations and bytes read: both passes, without weight gradients."""
    attention = 4 * WIDTH * WIDTH + 2 * (tokens // 4) * WIDTH  # a token; the second is scores and their sum
    routed = TOP_K * 3 * WIDTH * EXPERT_WIDTH
    router = experts * WIDTH
    forward = 2 * tokens * (LAYERS * (attention + routed + router) + WIDTH * VOCABULARY)
    weights = LAYERS * experts * 3 * WIDTH * EXPERT_WIDTH * itemsize
    return {"gflop": 2 * forward / 1e9, "expert_weights_read_gb": 2 * weights / 1e9}


def measured(model: torch.nn.Module, ids: torch.Tensor, median_s: float) -> dict[str, float]:
    """Return a step's milliseconds by kind of work."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step(model, ids)
    times: dict[str, float] = {}
    for event in recorded.key_averages():
        kind = kind_of(event.key)
        times[kind] = times.get(kind, 0.0) + event.self_cpu_time_total
    scale = median_s * 1000 / sum(times.values())
    return {kind: round(time * scale, 1) for kind, time in sorted(times.items(), key=lambda item: -item[1])}


def main() -> None:
    """Count, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models, ids = copies(build(), (FLOOR, EIGHTH, ALL)), token_ids(4, 128)
    times = alternate({name: partial(step, model, ids) for name, model in models.items()}, 5)
    rows: dict[str, Any] = {}
    for name, model in models.items():
        median_s = statistics.median(times[name])
        rows[name] = {"median_s": median_s, "ms_by_kind": measured(model, ids, median_s)}
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row["ms_by_kind"]))
    show(
        "where a step's milliseconds go",
        rows,
        {kind: lambda row, kind=kind: f"{row['ms_by_kind'].get(kind, 0):,.0f}" for kind in kinds},
    )
    save("breakdown", {"tokens": 512, "dtype": "float32", "threads": args.threads, **counted(512), "contenders": rows})


if __name__ == "__main__":
    main()
