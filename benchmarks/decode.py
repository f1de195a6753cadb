"""Decoding, one token at a time with a cache: the base model, adapters merged and not, and PEFT.

    python benchmarks/decode.py [--tokens 32] [--repeats 5]

Models: the small one of the other measurements, and two layers as wide as those of OLMoE-1B-7B, in which a product takes
longer than its call. Written to build/benchmarks/decode.json.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from typing import Any

import torch
from common import ALL, EIGHTH, FLOOR, PEFT, adapt, alternate, build, in_fresh_process, save, show, summed_up, token_ids
from torch import nn

OLMOE_WIDTHS, OLMOE_LAYERS = (2048, 1024), 2
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


def measure(dtype: str, num_tokens: int, repeats: int, *, wide: bool) -> dict[str, Any]:
    """Time all contenders in this process; for the wide model, only those that fit into memory together."""
    kind = getattr(torch, dtype)
    make = partial(build, kind, layers=OLMOE_LAYERS, widths=OLMOE_WIDTHS) if wide else partial(build, kind)
    models: dict[str, Any] = {BASE: make()}
    for name in (FLOOR, EIGHTH) if wide else (FLOOR, ALL, EIGHTH, PEFT):
        models[name] = adapt(make(), name)
    if not wide:
        models[MERGED] = adapt(make(), EIGHTH).merge_and_unload()
        models[PEFT_MERGED] = adapt(make(), PEFT).merge_and_unload()
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
    parser.add_argument("--wide", action="store_true", help="with --one: the wide model")
    args = parser.parse_args()
    if args.one:
        import json

        print(json.dumps(measure(args.one, args.tokens, args.repeats, wide=args.wide)))
        return
    cases = []
    for dtype, threads, wide in [*itertools.product(("float32", "bfloat16"), (1, 2), (False,)), ("bfloat16", 2, True)]:
        own = ["--one", dtype, "--tokens", args.tokens, "--repeats", args.repeats, *["--wide"] * wide]
        rows = in_fresh_process(__file__, *own, threads=threads)
        cases.append({"dtype": dtype, "threads": threads, "wide": wide, "contenders": rows})
        show(
            f"decoding, {dtype}, threads: {threads}" + (", as wide as OLMoE-1B-7B" if wide else ""),
            rows,
            {"tokens a second": lambda r: f"{r['tokens_per_s']:,.1f}", "x base": lambda r: f"{r['ratio']:.2f}"},
        )
    save("decode", {"tokens": args.tokens, "cases": cases})


if __name__ == "__main__":
    main()
