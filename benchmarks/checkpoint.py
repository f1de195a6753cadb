"""Saving and loading an adapter: size and time, compared with PEFT.

    python benchmarks/checkpoint.py [--repeats 5]

Every contender saves its adapter and loads it into a fresh copy of the model. Written to
build/benchmarks/checkpoint.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import peft
import torch
from common import ALL, EIGHTH, PEFT, adapt, build, save, show, token_ids

import apportion


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(2)
    base, rows = build(), {}
    for name in (PEFT, ALL, EIGHTH):
        model = adapt(copy.deepcopy(base), name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.02)
        expected = model(input_ids=token_ids(1, 16)).logits
        saving, loading = [], []
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(args.repeats + 1):
                start = time.perf_counter()
                model.save_pretrained(folder)
                saving.append(time.perf_counter() - start)
                fresh = copy.deepcopy(base)
                start = time.perf_counter()
                loaded = (
                    peft.PeftModel.from_pretrained(fresh, folder) if name == PEFT else apportion.load(fresh, folder)
                )
                loading.append(time.perf_counter() - start)
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        difference = float((loaded(input_ids=token_ids(1, 16)).logits - expected).abs().max())
        rows[name] = {
            "bytes": size,
            "save_s": statistics.median(saving[1:]),
            "load_s": statistics.median(loading[1:]),
            "largest_difference_of_logits": difference,
        }
    show(
        "adapter on disk",
        rows,
        {
            "MB": lambda r: f"{r['bytes'] / 1e6:.1f}",
            "save ms": lambda r: f"{r['save_s'] * 1000:.0f}",
            "load ms": lambda r: f"{r['load_s'] * 1000:.0f}",
            "difference": lambda r: f"{r['largest_difference_of_logits']:.1e}",
        },
    )
    save("checkpoint", {"contenders": rows})


if __name__ == "__main__":
    main()
