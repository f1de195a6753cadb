"""Shared code of the measurements: the model, the contenders, alternating rounds, peak memory, JSON."""

from __future__ import annotations

import copy
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Read when PyTorch starts: without them, products of many shapes in bfloat16 are prepared again and again on CPUs.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")
os.environ.setdefault("LRU_CACHE_CAPACITY", "65536")

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM

import apportion
from apportion.records.files import write_text

warnings.simplefilter("ignore")

LAYERS, WIDTH, EXPERT_WIDTH, TOP_K, RANK, VOCABULARY = 8, 512, 256, 8, 8, 1024
FLOOR, ALL, QUARTER, EIGHTH, PEFT = (
    "floor: attention alone",
    "ours: all experts",
    "ours: a quarter",
    "ours: an eighth",
    "PEFT: all experts",
)
FOLDER = Path("build/benchmarks")


def build(
    dtype: torch.dtype = torch.float32,
    experts: int = 64,
    layers: int = LAYERS,
    widths: tuple[int, int] = (WIDTH, EXPERT_WIDTH),
) -> OlmoeForCausalLM:
    """Make the model that every contender starts from, with random weights, which do not affect times."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=widths[0],
        intermediate_size=widths[1],
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=experts,
        num_experts_per_tok=TOP_K,
        pad_token_id=0,
        eos_token_id=1,
    )
    return OlmoeForCausalLM(config).to(dtype)


def token_ids(rows: int, length: int) -> torch.Tensor:
    """Draw tokens, shape (rows, length)."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def adapt(base: OlmoeForCausalLM, contender: str) -> nn.Module:
    """Attach a contender's adapter to a model."""
    if contender == PEFT:
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        )
        return peft.get_peft_model(base, config)
    profile = apportion.profile(base, [{"input_ids": token_ids(4, 128)}])
    shares = {QUARTER: 4, EIGHTH: 8}
    method = {FLOOR: "attention", ALL: "lora"}.get(contender, "hellora")
    options = {"hot": base.config.num_experts // shares[contender]} if contender in shares else {}
    return apportion.apply(base, apportion.plan(profile, method, rank=RANK, **options))


def alternate(contenders: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Time the contenders in turn, in seconds, after warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(repeats + warm_up):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if round_ >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def summed_up(times: Mapping[str, list[float]], reference: str) -> dict[str, dict[str, Any]]:
    """Return every contender's median and its ratio to the reference's; ratios are medians over rounds too."""
    return {
        name: {
            "median_s": statistics.median(own),
            "ratio": statistics.median(one / other for one, other in zip(own, times[reference], strict=True)),
            "all_s": own,
        }
        for name, own in times.items()
    }


def step(model: nn.Module, tokens: torch.Tensor) -> None:
    """Run one forward and backward pass."""
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad(set_to_none=True)


def memory_bytes(name: str) -> int:
    """Read this process's memory from Linux: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak_above(run: Callable[[], object]) -> int:
    """Return the peak memory of a function above the process's current memory."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free, but kept for later, is not held
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_bytes("VmRSS")
    run()
    return memory_bytes("VmHWM") - before


def in_fresh_process(script: str, *arguments: object, threads: int = 2) -> Any:
    """Run a script of this folder in a process, and parse the JSON that it prints.

    Args:
        script: The script's path.
        *arguments: Its arguments.
        threads: Threads that it may use.

    Returns:
        What its last line holds.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603
    return json.loads(done.stdout.splitlines()[-1])


def show(title: str, rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Callable[[Any], str]]) -> None:
    """Print a table of contenders."""
    table = Table("contender", *columns, title=title)
    for name, row in rows.items():
        table.add_row(name, *(shown(row) for shown in columns.values()))
    Console().print(table)


def save(name: str, facts: Mapping[str, Any]) -> None:
    """Write a measurement with versions and hardware."""
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    whole = {
        "measurement": name,
        **facts,
        "versions": {package: version(package) for package in ("apportion", "torch", "transformers", "peft")},
        "hardware": {"processor": processor, "cores": os.cpu_count()},
    }
    write_text(FOLDER / f"{name}.json", json.dumps(whole, indent=1) + "\n")


def copies(base: OlmoeForCausalLM, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """Adapt a copy of the model for every contender."""
    return {name: adapt(copy.deepcopy(base), name) for name in names}
