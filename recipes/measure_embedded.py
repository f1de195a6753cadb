"""Check that the embedded model is suitable for experiments, and write its model card.

    python recipes/measure_embedded.py

Two checks: whether routing is uneven and differs between tasks, and whether there is something to learn, so that exact
match is low before fine-tuning and high after LoRA on everything. The results are in the model card.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import apportion
from apportion.data.batches import batches, encode
from apportion.data.sources import read_rows
from apportion.data.tasks import task_rows
from apportion.demo import DemoSettings
from apportion.evaluation import evaluate
from apportion.methods.hot import hottest
from apportion.training.settings import TrainSettings
from apportion.training.sft import train
from pretrain_embedded import MIXTURE

FOLDER = Path(apportion.__file__).parent / "assets" / "embedded"
QUARTER = 4  # of 16 experts
PROMPTS = 200  # held-out prompts per task
HELD_OUT = 500  # items a score
STEPS = 150  # of fine-tuning, at the demonstration's batch size, learning rate and rank


def measure_routing(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Profile held-out prompts of every task: the load of the hottest quarter, and the overlap of these quarters."""
    streams = {}
    for name, (_, config) in MIXTURE.items():
        prompts = [{"text": row["prompt"]} for row in task_rows(name, "test", num_rows=PROMPTS, config=config)]
        encoded = [encode(row, tokenizer) for row in prompts]
        streams[name] = list(batches(encoded, tokenizer.pad_token_id, 32))
    profile = apportion.profile(model, streams)
    shares, hot = {}, {}
    for name, counts in profile.counts.items():
        top = counts.sort(dim=1, descending=True).values[:, :QUARTER].sum(1)
        shares[name] = float((top / counts.sum(1)).mean())
        hot[name] = [set(hottest(row, QUARTER)) for row in counts.double().numpy()]
    overlaps = [
        len(one & other) / len(one | other)
        for a, b in itertools.combinations(hot, 2)
        for one, other in zip(hot[a], hot[b], strict=True)
    ]
    return {
        "top_quarter_share": {name: round(share, 4) for name, share in shares.items()},
        "top_quarter_share_mean": round(sum(shares.values()) / len(shares), 4),
        "hot_quarter_jaccard_mean": round(sum(overlaps) / len(overlaps), 4),
    }


def measure_skills(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Score the model on held-out items of every task that it was trained on."""
    scores = {}
    for name, (_, config) in MIXTURE.items():
        score = evaluate(model, tokenizer, task_rows(name, "test", num_rows=PROMPTS, config=config), batch_size=50)
        scores[name] = {"exact_match": score.exact_match, "loss": round(score.loss, 4)}
    return scores


def measure_headroom(model: Any, tokenizer: Any, settings: DemoSettings) -> dict[str, Any]:
    """Fine-tune with LoRA on everything, and score 500 held-out items before and after."""
    found = {}
    for task, source in settings.tasks.items():
        held_out = read_rows(source, num_rows=HELD_OUT, split="test")
        rows = read_rows(source, num_rows=STEPS * settings.batch_size)
        encoded = [encode(row, tokenizer) for row in rows[:64]]
        profile = apportion.profile(model, batches(encoded, tokenizer.pad_token_id, 32))
        plan = apportion.plan(profile, "lora", rank=settings.rank)
        told = TrainSettings(steps=STEPS, batch_size=settings.batch_size, lr=settings.lr, save_every=10**6)
        before = evaluate(model, tokenizer, held_out, batch_size=50)
        with tempfile.TemporaryDirectory() as folder:
            result = train(copy.deepcopy(model), tokenizer, plan, rows, Path(folder) / "run", told, progress=False)
        after = evaluate(result.model, tokenizer, held_out, batch_size=50)
        found[task] = {
            "source": source,
            "held_out": len(held_out),
            "distinct_prompts": len({row["prompt"] for row in held_out}),
            "exact_match_before": before.exact_match,
            "exact_match_after_lora": after.exact_match,
            "loss_before": round(before.loss, 4),
            "loss_after_lora": round(after.loss, 4),
            "steps": STEPS,
            "batch_size": settings.batch_size,
            "lr": settings.lr,
            "rank": settings.rank,
            "seconds": round(result.seconds),
        }
    return found


def card(facts: dict[str, Any], found: dict[str, Any]) -> str:
    """Write the card from what was recorded and measured."""
    config = json.loads((FOLDER / "config.json").read_text())
    size = sum(path.stat().st_size for path in FOLDER.glob("*.safetensors"))
    routing, headroom, skills = found["routing"], found["headroom"], found["skills"]
    lines = [
        "# The embedded model",
        "",
        "A small Mixture-of-Experts language model for trying placements out where there is no network. It was trained",
        "from scratch on generated puzzles. It knows their prompts and some of their answers, and nothing else: use it",
        "to test software and compare methods, not to answer questions.",
        "",
        "| | |",
        "| --- | --- |",
        f"| architecture | `{config['architectures'][0]}`, {config['num_hidden_layers']} layers of "
        f"{config['num_experts']} experts, {config['num_experts_per_tok']} a token; width {config['hidden_size']}, "
        f"expert width {config['intermediate_size']} |",
        f"| parameters | {facts['parameters']:,}, bfloat16, {size / 1e6:.1f} MB |",
        f"| tokenizer | byte-level BPE of {config['vocab_size']:,} tokens, trained on the same text; every digit is one |",
        f"| data | {facts['documents']:,} documents of {len(facts['mixture'])} reasoning-gym tasks, training splits only |",
        f"| training | {facts['steps']:,} steps, {facts['tokens']:,} tokens, loss {facts['loss']['first']:.2f} at first, "
        f"{facts['loss']['loss']:.2f} at last (prompt and answer tokens) |",
        f"| seed | {facts['seed']} |",
        f"| wall time | {facts['wall_time_s'] / 60:.0f} minutes on two CPU cores that other work shared |",
        f"| command | `{facts['command']}` |",
        f"| versions | {', '.join(f'{name} {version}' for name, version in facts['versions'].items())} |",
        "",
        "## Is its routing uneven, and different by task?",
        "",
        f"On {PROMPTS} held-out prompts a task, the hottest quarter of each layer's experts takes on average "
        f"**{routing['top_quarter_share_mean']:.1%}** of the routed slots (even would be 25 %), and the hot quarters of "
        f"two different tasks have a mean Jaccard overlap of **{routing['hot_quarter_jaccard_mean']:.2f}**.",
        "",
        "## Is there something left to learn?",
        "",
        f"Exact match on {HELD_OUT} held-out items before and after LoRA on everything:",
        "",
        "| task | before | after | distinct prompts | steps x rows | rank | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {task} (`{h['source']}`) | {h['exact_match_before']:.3f} | {h['exact_match_after_lora']:.3f} | "
        f"{h['distinct_prompts']} | {h['steps']} x {h['batch_size']} | {h['rank']} | {h['seconds']} |"
        for task, h in headroom.items()
    ]
    lines += [
        "",
        "## The mixture, and what the model can do",
        "",
        f"Exact match and answer loss on {PROMPTS} held-out items of each task, with the options it was trained with.",
        "",
        "| task | share of documents | options | hot quarter's share | exact match | loss |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    total = sum(share for share, _ in MIXTURE.values())
    lines += [
        f"| {name} | {share / total:.1%} | {', '.join(f'{k}={v}' for k, v in config_.items()) or 'default'} | "
        f"{routing['top_quarter_share'][name]:.1%} | {skills[name]['exact_match']:.3f} | {skills[name]['loss']:.3f} |"
        for name, (share, config_) in MIXTURE.items()
    ]
    lines += ["", "Measured by `python recipes/measure_embedded.py`; the figures are in `measurements.json`.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", type=Path, help="first copy a freshly trained model from this folder")
    parser.add_argument("--skip-headroom", action="store_true", help="skip the fine-tuning")
    args = parser.parse_args()
    if args.install:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "pretraining.json"):  # fmt: skip
            shutil.copyfile(args.install / name, FOLDER / name)
    console = Console()
    torch.set_num_threads(2)
    model, tokenizer = apportion.embedded()
    facts = json.loads((FOLDER / "pretraining.json").read_text())
    start = time.time()
    found: dict[str, Any] = {"routing": measure_routing(model, tokenizer)}
    console.print(found["routing"])
    found["skills"] = measure_skills(model, tokenizer)
    found["headroom"] = {} if args.skip_headroom else measure_headroom(model, tokenizer, DemoSettings())
    console.print(found["headroom"], found["skills"], f"{time.time() - start:.0f} s")
    if not args.skip_headroom:
        (FOLDER / "measurements.json").write_text(json.dumps(found, indent=1) + "\n")
        (FOLDER / "README.md").write_text(card(facts, found))


if __name__ == "__main__":
    main()
