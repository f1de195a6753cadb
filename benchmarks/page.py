"""Write docs/benchmarks.md, its plots and the measurements beside it, from the JSON in build/benchmarks.

python benchmarks/page.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from common import FOLDER
from matplotlib import pyplot
from matplotlib.figure import Figure

from apportion.records.files import whole_file, write_text

PAGE, DATA, IMAGES = Path("docs/benchmarks.md"), Path("docs/results/benchmarks"), Path("docs/images")
README, MARKS = Path("README.md"), ("<!-- one step: written by benchmarks/page.py -->", "<!-- end -->")
COLOURS = {"floor": "#888888", "ours": "#0072b2", "PEFT": "#d55e00", "base": "#888888", "plain": "#888888"}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Write a Markdown table whose first column is text and whose others are numbers."""
    names = list(header)
    lines = ["| " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def megabytes(value: int | None) -> str:
    """Format bytes, if they were measured."""
    return "" if value is None else f"{value / 1e6:,.0f}"


def save_figure(figure: Figure, name: str) -> str:
    """Write a plot, and return the Markdown that shows it."""
    with whole_file(IMAGES / name) as path:
        figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return f"![](images/{name})"


def bars(title: str, groups: dict[str, dict[str, float]], unit: str, name: str) -> str:
    """Draw a group of bars for every setting, and return the Markdown that shows them."""
    figure, axes = pyplot.subplots(figsize=(8, 0.28 * sum(len(group) + 1 for group in groups.values()) + 0.8))
    place, ticks = 0.0, []
    for setting, group in groups.items():
        ticks.append((place + (len(group) - 1) / 2, setting))
        for contender, value in group.items():
            axes.barh(place, value, color=COLOURS.get(contender.split()[0].rstrip(":"), COLOURS["ours"]), height=0.85)
            axes.text(value, place, f" {value:.2f}  {contender}", va="center", fontsize=8)
            place += 1
        place += 1
    axes.set_yticks([position for position, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()
    largest = max(value for group in groups.values() for value in group.values())
    if largest > 10:
        axes.set_xscale("log")
    axes.set_xlim(0.5 if largest > 10 else 0, (8 if largest > 10 else 1.35) * largest)
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return save_figure(figure, name)


def setting_of(case: dict[str, Any]) -> str:
    """Return a case's title."""
    tokens = f"{case['tokens']} tokens, " if "tokens" in case else ""
    wide = ", OLMoE-1B-7B's widths" if case.get("wide") else ""
    return f"{tokens}{case['dtype']}, {case['threads']} thread{'s' if case['threads'] > 1 else ''}{wide}"


def step_table(case: dict[str, Any]) -> list[str]:
    """Write one setting's table of training steps."""
    rows = (
        (
            name,
            f"{row['median_s'] * 1000:,.0f}",
            f"{row['ratio']:.2f}",
            megabytes(row.get("peak_above_model_bytes")),
            f"{row['trainable_parameters']:,}",
        )
        for name, row in case["contenders"].items()
    )
    return table(("contender", "ms", "x floor", "memory, MB", "trainable parameters"), rows)


def training(facts: dict[str, Any]) -> Iterable[str]:
    """Write the section on training steps."""
    yield from ("## One training step", "")
    yield (
        f"Forward and backward pass; a model of {facts['model']}. The floor is LoRA on attention alone, with transformers' "
        "own experts: the same passes through frozen experts, and nothing for them. Times are medians, ratios medians over "
        "alternating rounds; memory is the peak of a fresh process above its model, gradients of the factors included."
    )
    yield ""
    for case in facts["cases"]:
        yield from (f"**{setting_of(case)}**", "", *step_table(case))
    groups = {setting_of(case): {n: row["ratio"] for n, row in case["contenders"].items()} for case in facts["cases"]}
    yield from (bars("One training step, against the floor", groups, "x floor", "benchmarks-step.svg"), "")
    grown = facts["growth"]
    yield from ("### More experts, as many a token", "")
    yield (
        f"{grown['layers']} layers, {grown['tokens']} tokens, {grown['dtype']}, {grown['threads']} threads, eight experts a "
        "token: a step's time, and in brackets how often that of the smallest model. Of the base model it is a forward "
        "pass: with more experts there are more weights to read, so every step must grow as it does."
    )
    yield ""
    rows = [
        (experts, *(f"{row['median_s'] * 1000:,.0f} ({row['growth']:.2f})" for row in found.values()))
        for experts, found in grown["experts"].items()
    ]
    names = next(iter(grown["experts"].values()))
    yield from table(("experts", *(f"{name}, ms" for name in names)), rows)


def ratios(title: str, text: str, facts: dict[str, Any], reference: str, picture: str) -> Iterable[str]:
    """Write a section of tokens per second and ratios."""
    yield from (f"## {title}", "", text, "")
    for case in facts["cases"]:
        yield from (f"**{setting_of(case)}**", "")
        rows = (
            (name, f"{row['tokens_per_s']:,.1f}", f"{row['ratio']:.2f}") for name, row in case["contenders"].items()
        )
        yield from table(("contender", "tokens a second", f"time, x {reference}"), rows)
    groups = {setting_of(case): {n: row["ratio"] for n, row in case["contenders"].items()} for case in facts["cases"]}
    yield from (bars(title, groups, f"x {reference}", picture), "")


def checkpoints(facts: dict[str, Any]) -> Iterable[str]:
    """Write the section on files."""
    yield from ("## Adapters on disk", "", "The model of the training step, rank 8, float32; medians.", "")
    rows = (
        (name, f"{row['bytes'] / 1e6:.1f}", f"{row['save_s'] * 1000:.0f}", f"{row['load_s'] * 1000:.0f}")
        for name, row in facts["contenders"].items()
    )
    yield from table(("contender", "MB", "save, ms", "load, ms"), rows)


def sensitivities(facts: dict[str, Any]) -> Iterable[str]:
    """Write the section on sensitivity."""
    yield from ("## Sensitivity", "")
    yield f"{facts['model']}; {facts['tokens_a_row']} tokens a row, {facts['dtype']}, {facts['threads']} threads."
    yield ""
    rows = (
        (name, f"{facts['median_s'][name]:.2f}" if name in facts["median_s"] else "", megabytes(peak))
        for name, peak in facts["peak_above_model_bytes"].items()
    )
    yield from table(("contender", "s a sample of every layer", "memory, MB"), rows)


def real(facts: dict[str, Any]) -> Iterable[str]:
    """Write the section on real models."""
    yield from ("## Real models, end to end", "")
    yield (
        f"{facts['steps']} steps on `{facts['task']}`, the same rows and learning rate for all, through TRL's trainer on two "
        "threads; the loss is of one seed on 64 held-out rows and says that all of them learn, not which learns best."
    )
    yield ""
    for model, contenders in facts["models"].items():
        yield from (f"**{model}**", "")
        rows = (
            (
                name,
                f"{row['profile_s']:.1f}" if "profile_s" in row else "",
                f"{row['train_s']:.1f}",
                f"{row['loss_after']:.3f}",
                f"{row['trainable_parameters']:,}",
            )
            for name, row in contenders.items()
        )
        yield from table(("contender", "profile, s", "train, s", "loss after", "trainable parameters"), rows)


def main() -> None:
    """Read the measurements, and write the page."""
    mpl.rcParams["svg.hashsalt"] = "apportion"
    names = ("train_step", "decode", "profiling", "sensitivity", "checkpoint", "real")
    found = {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in names}
    versions, hardware = found["train_step"]["versions"], found["train_step"]["hardware"]
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`, from measurements that each run all contenders in turn in one process. They are of one "
        f"machine ({hardware['processor']}, {hardware['cores']} cores, no GPU), which repeats itself to about 8 %: look at "
        "ratios, not at milliseconds. The numbers are in `docs/results/benchmarks`; what they are made of is told in "
        "[Performance](performance.md).",
        "",
        ", ".join(f"{package} {version}" for package, version in versions.items()) + ".",
        "",
        *training(found["train_step"]),
        *ratios(
            "Decoding",
            f"One sequence, {found['decode']['tokens']} tokens, one at a time with a cache. The small model's experts are so quick "
            "that calls weigh as much as products; the last setting has two layers as wide as OLMoE-1B-7B's.",
            found["decode"],
            "base",
            "benchmarks-decode.svg",
        ),
        *ratios(
            "Profiling",
            f"{found['profiling']['rows']} rows of 16 to 128 tokens in batches of {found['profiling']['batch_size']}, rows of "
            "like length together, against a plain forward pass over the same batches. Profiling runs the model without its "
            "head, which can make it the faster one.",
            found["profiling"],
            "plain",
            "benchmarks-profiling.svg",
        ),
        *sensitivities(found["sensitivity"]),
        *checkpoints(found["checkpoint"]),
        *real(found["real"]),
    ]
    write_text(PAGE, "\n".join(lines).rstrip() + "\n")
    before, _, rest = README.read_text().partition(MARKS[0])
    shown = "\n".join(step_table(found["train_step"]["cases"][0]))
    write_text(README, f"{before}{MARKS[0]}\n{shown}{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    DATA.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(FOLDER / f"{name}.json", DATA / f"{name}.json")


if __name__ == "__main__":
    main()
