"""Sensitivity of every matrix: one pass per sample, compared with the released block-coordinate procedure.

    python benchmarks/sensitivity.py [--threads 2] [--repeats 3]

Time, at the same number of samples per layer: one pass over one row, against one row for each layer. Memory above the
model, each in a separate process on the same batch: one pass, the released procedure, and a LoRA training step of
rank 8 (PEFT, every linear layer, AdamW). The model has the shape of SmolLM2-135M with random weights: neither figure
depends on their values. Written to build/benchmarks/sensitivity.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import apportion
from apportion.records.files import write_text

LAYERS, TOKENS, ROWS, RANK = 30, 96, 4, 8
CONTENDERS = ("one pass", "released procedure", "LoRA step")


def build() -> LlamaForCausalLM:
    """Make the model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def batch(rows: int) -> dict[str, Tensor]:
    """Make rows whose second half is labelled."""
    ids = torch.randint(3, 49152, (rows, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : TOKENS // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def run(contender: str, model: Any, rows: int) -> float:
    """Measure one contender on some rows, in seconds."""
    inputs = batch(rows)
    if contender == "LoRA step":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        start = time.perf_counter()
        model(**inputs).loss.backward()
        optimizer.step()
        return time.perf_counter() - start
    start = time.perf_counter()
    apportion.profile(model, [inputs], sensitivity="one-pass" if contender == "one pass" else "block-coordinate")
    return time.perf_counter() - start


def peak_bytes(contender: str, rows: int) -> int:
    """Return a contender's peak memory above the model's."""
    model: Any = build()
    if contender == "LoRA step":
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)).train()
    with torch.no_grad():  # what the first pass of any kind allocates for good
        model(input_ids=batch(1)["input_ids"][:, :8])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_bytes("VmRSS")
    run(contender, model, rows)
    return memory_bytes("VmHWM") - before


def memory_bytes(name: str) -> int:
    """Read this process's memory from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak-of", choices=CONTENDERS, help="print one contender's peak memory, and no more")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak_bytes(args.peak_of, LAYERS if args.peak_of == "released procedure" else ROWS))
        return
    model = build()
    times: dict[str, list[float]] = {"one pass": [], "released procedure": []}
    for round_ in range(args.repeats + 1):
        for name, found in times.items():
            seconds = run(name, model, 1 if name == "one pass" else LAYERS)
            if round_:
                found.append(seconds)
    del model
    peaks = {}
    for name in CONTENDERS:
        command = [sys.executable, __file__, "--peak-of", name, "--threads", str(args.threads)]
        peaks[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603
    medians = {name: statistics.median(found) for name, found in times.items()}
    table = Table("contender", "median s a sample of every layer", "peak above the model")
    for name in CONTENDERS:
        shown = f"{medians[name]:.2f}" if name in medians else ""
        rows = "row by row" if name == "released procedure" else f"{ROWS} rows at once"
        table.add_row(name, shown, f"{peaks[name] / 1e6:,.0f} MB, {rows}")
    Console().print(table)
    facts = {
        "model": f"Llama of {LAYERS} layers, width 576, 210 matrices, random weights",
        "tokens_a_row": TOKENS,
        "threads": args.threads,
        "dtype": "float32",
        "median_s": medians,
        "all_s": times,
        "one_pass_over_released": medians["one pass"] / medians["released procedure"],
        "peak_above_model_bytes": peaks,
        "one_pass_over_lora_step_memory": peaks["one pass"] / peaks["LoRA step"],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "hardware": platform.processor() or platform.machine(),
    }
    write_text(Path("build/benchmarks/sensitivity.json"), json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
