"""LoRI and HELLoRI on the embedded model: what a tenth of B learns, and whether its adapters interfere less.

    python recipes/hellori_embedded.py -o build/hellori              # five seeds, about half an hour on two cores
    python recipes/hellori_embedded.py -o build/hellori-quick --quick

Two tasks are trained separately with `lora`, `hellora`, `lori` and `hellori`. Each method's learning rate is chosen on a
separate seed, among the same number of candidates. Then the two adapters of a method are combined by concatenation, and
the second task is trained on top of the first one's merged adapter: LoRI claims that sparse masks keep tasks from
interfering. Finished runs are not repeated. RESULTS.json and RESULTS.md are rewritten after every run.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

import apportion
from apportion.data.batches import batches, encode
from apportion.data.sources import read_rows
from apportion.demo import DemoSettings
from apportion.evaluation import evaluate_tasks
from apportion.records.files import write_text
from apportion.records.mask import load_mask
from apportion.records.plan import Plan
from apportion.training.settings import TrainSettings
from apportion.training.sft import train

TASKS = DemoSettings().tasks
LEARNING_RATES = {"lora": (2e-3, 5e-3, 1.5e-2), "hellora": (2e-3, 5e-3, 1.5e-2)}
LEARNING_RATES |= {"lori": (1.5e-2, 5e-2, 1.5e-1), "hellori": (1.5e-2, 5e-2, 1.5e-1)}
TUNING_SEED = 100


@dataclass(frozen=True)
class Settings:
    """Settings, the same for all methods.

    Args:
        steps: Optimizer steps; LoRI's first phase has a tenth of them besides.
        batch_size: Rows per step.
        tune_batch_size: Rows per step where a learning rate is chosen.
        eval_rows: Held-out rows per evaluation.
        rank: Rank of every adapter.
        hot: Experts a layer that `hellora` and `hellori` keep, of 16.
        seeds: Seeds of the factors' start and of the rows' order.
        pair_seeds: Seeds for which adapters are merged and trained on top of each other.
    """

    steps: int = 40
    batch_size: int = 32
    tune_batch_size: int = 16
    eval_rows: int = 200
    rank: int = 16
    hot: int = 4
    seeds: int = 5
    pair_seeds: int = 2


def main() -> None:
    """Tune, train, merge, continue, write."""
    settings, folder = parse()
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "settings.json"
    if known.is_file() and json.loads(known.read_text()) != asdict(settings):
        message = f"{folder} holds a study with other settings"
        raise SystemExit(message)
    write_text(known, json.dumps(asdict(settings), indent=1) + "\n")
    study = Study(folder, settings)
    results: dict[str, Any] = {
        "settings": asdict(settings),
        "tasks": TASKS,
        "versions": study.versions,
        "parameters": {name: plan.cost.trainable_parameters for name, plan in study.plans["siblings"].items()},
        "before": study.once("before.json", lambda: study.scores(study.model)),
        "learning_rates": {method: study.tuned(method) for method in LEARNING_RATES},
        "apart": [],
        "merged": [],
        "on_top": [],
    }
    for seed in range(settings.seeds):
        for method in LEARNING_RATES:
            for task in TASKS:
                results["apart"].append(study.apart(method, task, seed))
            if seed < settings.pair_seeds:
                results["merged"].append(study.merged(method, seed))
                results["on_top"].append(study.on_top(method, seed))
            write_text(folder / "RESULTS.json", json.dumps(results, indent=1) + "\n")
            write_text(folder / "RESULTS.md", tables(results))
    print(tables(results))


def parse() -> tuple[Settings, Path]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for adapters and results")
    parser.add_argument("--quick", action="store_true", help="a few steps and one seed, as a smoke test")
    given = parser.parse_args()
    return (Settings(4, 8, 8, 16, 4, 4, 1, 1) if given.quick else Settings()), given.output


class Study:
    """The model, the data and the plans, and every kind of run on them."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.model, self.tokenizer = apportion.embedded()
        count = settings.steps * settings.batch_size
        self.rows = {name: read_rows(source, num_rows=count) for name, source in TASKS.items()}
        self.held_out = {n: read_rows(s, num_rows=settings.eval_rows, split="test") for n, s in TASKS.items()}
        self.plans: dict[str, dict[str, Plan]] = {}
        for task, rows in self.rows.items():
            encoded = [encode(row, self.tokenizer) for row in rows[:256]]
            stream = batches(encoded, int(self.tokenizer.pad_token_id), 32)
            profile = apportion.profile(self.model, stream, provenance={"model": "embedded"})
            self.versions = profile.provenance["versions"]
            self.plans[task] = {
                method: apportion.plan(
                    profile, method, rank=settings.rank, **({"hot": settings.hot} if "hellor" in method else {})
                )
                for method in LEARNING_RATES
            }

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """Do a piece of work, or read its result if it is finished."""
        path = self.folder / name
        if not path.is_file():
            print(name)
            write_text(path, json.dumps(work(), indent=1) + "\n")
        return json.loads(path.read_text())

    def scores(self, model: Any, rows: Any = None) -> dict[str, float]:
        """Return exact match on every task."""
        found = evaluate_tasks(model, self.tokenizer, rows or self.held_out)
        return {name: float(result.exact_match or 0.0) for name, result in found.tasks.items()}

    def train(self, model: Any, method: str, task: str, seed: int, lr: float, folder: Path) -> PeftModel:
        """Train one adapter."""
        rows = self.settings.tune_batch_size if seed == TUNING_SEED else self.settings.batch_size
        todo = TrainSettings(steps=self.settings.steps, batch_size=rows, lr=lr, seed=seed)
        plan = self.plans[task][method]
        data = self.rows[task][: self.settings.steps * rows]
        done = train(model, self.tokenizer, plan, data, folder, todo, resume=True, progress=False)
        if done.interrupted:
            raise SystemExit(1)
        return done.model

    def tuned(self, method: str) -> dict[str, Any]:
        """Choose a method's learning rate on the first task, by exact match on training prompts of another seed."""
        task = next(iter(TASKS))
        validation = {task: read_rows(TASKS[task], num_rows=self.settings.eval_rows, seed=1)}

        def work() -> dict[str, Any]:
            found = {}
            for lr in LEARNING_RATES[method]:

                def try_one(lr: float = lr) -> float:
                    folder = self.folder / f"tune-{method}-{lr}"
                    trained = self.train(copy.deepcopy(self.model), method, task, TUNING_SEED, lr, folder)
                    return self.scores(trained, validation)[task]

                found[str(lr)] = self.once(f"tune-{method}-{lr}.json", try_one)
            return {"scores": found, "chosen": float(max(found, key=lambda lr: found[lr]))}

        chosen: dict[str, Any] = self.once(f"tune-{method}.json", work)
        return chosen

    def rate(self, method: str) -> float:
        """Return a method's learning rate."""
        return float(self.tuned(method)["chosen"])

    def adapter(self, method: str, task: str, seed: int) -> Path:
        """Return the folder of one adapter."""
        return self.folder / f"{method}-{task}-{seed}"

    def apart(self, method: str, task: str, seed: int) -> dict[str, Any]:
        """Train one task, and evaluate both."""
        folder = self.adapter(method, task, seed)

        def work() -> dict[str, Any]:
            model = self.train(copy.deepcopy(self.model), method, task, seed, self.rate(method), folder)
            return {"method": method, "task": task, "seed": seed, "scores": self.scores(model)}

        found: dict[str, Any] = self.once(f"apart-{method}-{task}-{seed}.json", work)
        return found

    def merged(self, method: str, seed: int) -> dict[str, Any]:
        """Concatenate both tasks' adapters, each at weight 1, and evaluate both tasks."""

        def work() -> dict[str, Any]:
            first, second = (self.adapter(method, task, seed) for task in TASKS)
            model = apportion.load(copy.deepcopy(self.model), first, adapter_name="first")
            model.load_adapter(str(second), "second")
            model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "both", combination_type="cat")
            model.set_adapter("both")
            facts: dict[str, Any] = {"method": method, "seed": seed, "scores": self.scores(model)}
            if method.endswith("lori"):
                facts["masks"] = load_mask(first / "mask.safetensors").overlap(load_mask(second / "mask.safetensors"))
            return facts

        found: dict[str, Any] = self.once(f"merged-{method}-{seed}.json", work)
        return found

    def on_top(self, method: str, seed: int) -> dict[str, Any]:
        """Merge the first task's adapter into the model, train the second task on top, and evaluate both tasks."""
        first, second = TASKS

        def work() -> dict[str, Any]:
            base = apportion.load(copy.deepcopy(self.model), self.adapter(method, first, seed)).merge_and_unload()
            folder = self.folder / f"on_top-{method}-{seed}"
            model = self.train(base, method, second, seed, self.rate(method), folder)
            return {"method": method, "seed": seed, "scores": self.scores(model)}

        found: dict[str, Any] = self.once(f"on_top-{method}-{seed}.json", work)
        return found


def tables(results: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    first, second = TASKS
    lines = [
        f"| method | parameters | {first} trained: {first} | {second} | {second} trained: {first} | {second} |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| before | | {results['before'][first]:.3f} | {results['before'][second]:.3f} | | |",
    ]
    for method in LEARNING_RATES:
        cells = []
        for trained in TASKS:
            runs = [run for run in results["apart"] if run["method"] == method and run["task"] == trained]
            cells += [spread([run["scores"][task] for run in runs]) for task in TASKS]
        lines.append(f"| `{method}` | {results['parameters'][method]:,} | {' | '.join(cells)} |")
    lines += ["", f"| method | merged: {first} | {second} | {second} on top of {first}: {first} | {second} |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for method in LEARNING_RATES:
        cells = []
        for kind in ("merged", "on_top"):
            runs = [run for run in results[kind] if run["method"] == method]
            cells += [spread([run["scores"][task] for run in runs]) for task in TASKS]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    overlaps = [run["masks"]["shared_frac"] for run in results["merged"] if "masks" in run]
    rates = ", ".join(f"`{method}` {found['chosen']:g}" for method, found in results["learning_rates"].items())
    lines += ["", f"Learning rates chosen: {rates}."]
    lines.append(f"Entries that both tasks' masks keep: {spread(overlaps)} of a mask's; a tenth by chance.")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Format a mean with its standard deviation."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


if __name__ == "__main__":
    main()
