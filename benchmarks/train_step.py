"""One training step, side by side: attention alone, PEFT on all experts, and this package on all and on an eighth.

    python benchmarks/train_step.py [--threads 2] [--repeats 7]

All contenders run alternately in one process on the same model and tokens; medians of forward and backward are
written to build/benchmarks/train_step.json. The floor is attention-only LoRA with transformers' own experts.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

import apportion
from apportion.records.files import write_text

LAYERS, WIDTH, EXPERT_WIDTH, EXPERTS, TOP_K, RANK = 8, 512, 256, 64, 8, 8


def build() -> OlmoeForCausalLM:
    """Make the model that every contender starts from."""
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=1024,
            hidden_size=WIDTH,
            intermediate_size=EXPERT_WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=8,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def contenders(base: nn.Module, tokens: Tensor) -> dict[str, nn.Module]:
    """Adapt copies of the model in every way that is compared."""
    profile = apportion.profile(base, [{"input_ids": tokens}])
    ours = {"floor: attention": "attention", "ours: all experts": "lora", "ours: an eighth": "hellora"}
    adapted: dict[str, nn.Module] = {}
    for name, method in ours.items():
        options = {"hot": EXPERTS // 8} if method == "hellora" else {}
        adapted[name] = apportion.apply(copy.deepcopy(base), apportion.plan(profile, method, rank=RANK, **options))
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    adapted["PEFT: all experts"] = get_peft_model(copy.deepcopy(base), config)
    return adapted


def step(model: nn.Module, tokens: Tensor) -> float:
    """Time one forward and backward pass, in seconds."""
    model.train()
    start = time.perf_counter()
    model(input_ids=tokens, labels=tokens).loss.backward()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def measure(models: dict[str, nn.Module], run: Callable[[nn.Module], float], repeats: int) -> dict[str, list[float]]:
    """Run the contenders in turn, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(repeats + 1):
        for name, model in models.items():
            seconds = run(model)
            if round_:
                times[name].append(seconds)
    return times


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    tokens = torch.randint(2, 1024, (4, args.tokens // 4))
    models = contenders(build(), tokens)
    times = measure(models, lambda model: step(model, tokens), args.repeats)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    floor = medians["floor: attention"]
    trainable = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in models.items()}
    rows = {
        name: {
            "median_s": seconds,
            "over_floor": seconds / floor,
            "trainable_parameters": trainable[name],
            "all_s": times[name],
        }
        for name, seconds in medians.items()
    }
    table = Table("contender", "median ms", "x floor", "trainable")
    for name, row in rows.items():
        table.add_row(
            name, f"{row['median_s'] * 1000:,.0f}", f"{row['over_floor']:.2f}", f"{row['trainable_parameters']:,}"
        )
    Console().print(table)
    facts = {
        "tokens": args.tokens,
        "threads": args.threads,
        "dtype": "float32",
        "model": f"{LAYERS} layers, width {WIDTH}, {EXPERTS} experts of {EXPERT_WIDTH}, top-{TOP_K}, rank {RANK}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "hardware": platform.processor() or platform.machine(),
        "contenders": rows,
    }
    write_text(Path("build/benchmarks/train_step.json"), json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
