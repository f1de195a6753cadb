"""Decoding, one token at a time with a cache: the base model, adapters merged and not, and PEFT.

    python benchmarks/decode.py [--tokens 32] [--repeats 5]

Written to build/benchmarks/decode.json.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from common import ALL, EIGHTH, PEFT, adapt, alternate, build, in_fresh_process, save, show, summed_up, token_ids
from torch import nn

BASE, MERGED, PEFT_MERGED = "base model", "ours: an eighth, merged", "PEFT: all experts, merged"


@torch.no_grad()
def decode(model: nn.Module, num_tokens: int) -> None:
    """Generate tokens greedily after a prompt of 16."""
    prompt = token_ids(1, 16)
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
    )


def measure(dtype: str, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Time all contenders in this process."""
    kind = getattr(torch, dtype)
    models: dict[str, Any] = {BASE: build(kind)}
    for name in (ALL, EIGHTH, PEFT):
        models[name] = adapt(build(kind), name)
    models[MERGED] = adapt(build(kind), EIGHTH).merge_and_unload()
    models[PEFT_MERGED] = adapt(build(kind), PEFT).merge_and_unload()
    runs = {name: partial(decode, model.eval(), num_tokens) for name, model in models.items()}
    rows = summed_up(alternate(runs, repeats), BASE)
    for row in rows.values():
        row["tokens_per_s"] = num_tokens / row["median_s"]
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", choices=["float32", "bfloat16"], help="measure one type, and print JSON")
    args = parser.parse_args()
    if args.one:
        import json

        print(json.dumps(measure(args.one, args.tokens, args.repeats)))
        return
    cases = []
    for dtype in ("float32", "bfloat16"):
        for threads in (1, 2):
            rows = in_fresh_process(
                __file__, "--one", dtype, "--tokens", args.tokens, "--repeats", args.repeats, threads=threads
            )
            cases.append({"dtype": dtype, "threads": threads, "contenders": rows})
            show(
                f"decoding, {dtype}, threads: {threads}",
                rows,
                {"tokens a second": lambda r: f"{r['tokens_per_s']:,.1f}", "x base": lambda r: f"{r['ratio']:.2f}"},
            )
    save("decode", {"tokens": args.tokens, "cases": cases})


if __name__ == "__main__":
    main()
