"""Options of every command. Each command's module is imported only when the command runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from apportion._version import __version__
from apportion.cli.flags import option_flags
from apportion.cli.options import (
    CONFIG_HELP,
    DATA_HELP,
    MODEL_HELP,
    Alpha,
    Dtype,
    Force,
    Json,
    Loading,
    MethodName,
    Procedure,
    Rank,
    TrustRemoteCode,
)
from apportion.cli.running import given, run
from apportion.cpu_caches import CPU_CACHES
from apportion.methods.registry import METHODS
from apportion.records.options import SparseTraining

_METHOD_OPTIONS = {name: method.options for name, method in METHODS.items()}

app = typer.Typer(
    help="Measure where a model routes your data, and place, train and compare LoRA adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Handle options that apply to no command."""
    if version:
        typer.echo(f"apportion {__version__}")
        raise typer.Exit


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for results, plans and adapters.")] = Path(
        "apportion-demo"
    ),
    quick: Annotated[bool, typer.Option(help="Train a tenth of the steps, to check that everything works.")] = False,
    json_: Json = False,
) -> None:
    """Profile, plan, train and compare five methods on the embedded model."""
    run("demo", output=output, quick=quick, as_json=json_)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    data: Annotated[list[str], typer.Option(help=f"[TASK=]DATA; repeatable. {DATA_HELP}")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Profile to write: a .safetensors file.")],
    samples: Annotated[int, typer.Option(min=1, help="Rows to read per data set.")] = 256,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens kept per row.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 16,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also measure the squared gradient norm of every matrix.")
    ] = False,
    sensitivity_procedure: Annotated[
        Procedure | None,
        typer.Option(
            help="one-pass (frozen model) or block-coordinate (as in LoRA-SMoE's released code).",
            show_default="one-pass",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of generated tasks.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype to load the model in.")] = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Keep the weights on disk; load each module's weights when it runs.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Measure which experts a model routes your data to."""
    run(
        "profile", model=model, data=data, output=output, samples=samples, max_length=max_length, batch_size=batch_size,
        sensitivity=sensitivity, procedure=sensitivity_procedure, seed=seed, force=force,
        loading=Loading(dtype, trust_remote_code, low_memory), as_json=json_,
    )  # fmt: skip


@app.command()
@option_flags(_METHOD_OPTIONS)
def plan(
    profile: Annotated[Path, typer.Argument(help="Profile file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Plan to write: a .json file.")],
    method: MethodName = "hellora",
    rank: Rank = 32,
    alpha: Alpha = None,
    seed: Annotated[int, typer.Option(help="Random seed, for methods that sample.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="Write a heat map of the experts to this .svg file.")] = None,
    force: Force = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """Choose from a profile which sites get an adapter, and show the cost."""
    run(
        "plan", profile=profile, output=output, method=method, rank=rank, alpha=alpha, seed=seed, options=options,
        picture=picture, force=force, as_json=json_,
    )  # fmt: skip


@app.command()
@option_flags(_METHOD_OPTIONS)
def cost(
    model: Annotated[str, typer.Argument(help=CONFIG_HELP)],
    method: MethodName = "hellora",
    rank: Rank = 32,
    seed: Annotated[int, typer.Option(help="Random seed, for methods that sample.")] = 0,
    profile: Annotated[Path | None, typer.Option(help="Profile with the measured routing.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """Count the cost of a method on a model, without loading weights."""
    run(
        "cost", model=model, method=method, rank=rank, seed=seed, profile=profile, options=options,
        trust_remote_code=trust_remote_code, as_json=json_,
    )  # fmt: skip


@app.command()
@option_flags({"train": SparseTraining})
def train(
    plan: Annotated[Path, typer.Argument(help="Plan file.")],
    data: Annotated[list[str], typer.Option(help=f"[TASK=]DATA; repeatable. {DATA_HELP}")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the adapter and checkpoints.")],
    weights: Annotated[
        str | None,
        typer.Option(help="Weight of each task in the mixture: a=2,b=1.", show_default="number of rows"),
    ] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, show_default="the profiled model")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Rows to read per data set.", show_default="all; 1000 per generated task")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 3.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; overrides --epochs.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-4,
    batch_size: Annotated[int, typer.Option(help="Rows per device and batch.")] = 16,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens kept per row.")] = 1024,
    dropout: Annotated[float, typer.Option(help="Dropout on adapter inputs; not applied to routers.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 0.0,
    router_aux_loss: Annotated[float, typer.Option(help="Weight of the model's load-balancing loss.")] = 0.0,
    balance_loss: Annotated[float, typer.Option(help="Weight of the balance loss of routed LoRA experts.")] = 0.0,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Use less memory and more time.")] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    on_top_of: Annotated[
        Path | None, typer.Option(help="Folder of an adapter to merge into the model before training.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="Mask file to use instead of finding a mask.", rich_help_panel=SparseTraining.panel),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial adapters and of the row order.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype to load the model in.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    json_: Json = False,
    **sparse: Any,
) -> None:
    """Train a plan's adapters (TRL's SFTTrainer; loss on completions only)."""
    settings = {
        "epochs": epochs, "steps": steps, "lr": lr, "batch_size": batch_size, "max_length": max_length,
        "gradient_accumulation": gradient_accumulation, "dropout": dropout, "weight_decay": weight_decay,
        "router_aux_loss": router_aux_loss, "balance_loss": balance_loss, "save_every": save_every, "seed": seed,
        "gradient_checkpointing": gradient_checkpointing, "sparse": sparse,
    }  # fmt: skip
    run(
        "train", plan=plan, data=data, weights=weights, output=output, model=model, samples=samples,
        settings=settings, mask=mask, on_top_of=on_top_of, resume=resume,
        loading=Loading(dtype, trust_remote_code), as_json=json_,
    )  # fmt: skip


@app.command(name="eval")
def eval_(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    data: Annotated[
        list[str],
        typer.Option(help=f"[TASK=]DATA; repeatable. {DATA_HELP} Generated tasks default to the test split."),
    ],
    adapter: Annotated[Path | None, typer.Option(help="Folder of an adapter.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Rows to read per data set.")] = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 32,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens scored per row.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of generated tasks.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype to load the model in.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Score a model: loss, perplexity, and exact match for rows with an answer."""
    run(
        "evaluate", model=model, data=data, adapter=adapter, samples=samples, batch_size=batch_size,
        max_length=max_length, seed=seed, dtype=dtype, trust_remote_code=trust_remote_code, as_json=json_,
    )  # fmt: skip


@app.command()
def compare(
    study: Annotated[
        Path | None, typer.Argument(help="Study file (.toml), or a study's folder to summarise again.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for results.", show_default="build/NAME")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"Repeatable. {MODEL_HELP}")] = None,
    data: Annotated[list[str] | None, typer.Option(help=f"[TASK=]DATA; repeatable. {DATA_HELP}")] = None,
    unrelated: Annotated[str | None, typer.Option(help="Unrelated data, to measure forgetting.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Method, or full for full fine-tuning; repeatable.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Method that the others are compared with.", show_default="the first method")
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="A number, or METHOD:RANK for the cost of METHOD at RANK; repeatable.")
    ] = None,
    unit: Annotated[
        str | None, typer.Option(help="Unit of the budgets: parameters or flops.", show_default="parameters")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs per method, task and budget.", show_default="5")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps per run.", show_default="40")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step.", show_default="32")] = None,
    trials: Annotated[int | None, typer.Option(help="Learning rates tried per method.", show_default="5")] = None,
    eval_rows: Annotated[int | None, typer.Option(help="Held-out rows per score.", show_default="200")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Parallel runs, one process each.")] = 1,
    page: Annotated[
        Path | None, typer.Option(help="Write a Markdown page with tables and plots, and a JSON file.")
    ] = None,
    keep_adapters: Annotated[bool, typer.Option("--keep-adapters", help="Keep every run's adapter.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Profile and plan, and show how close the budgets are; do not train.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Compare methods at equal budgets over several seeds. Finished runs are not repeated."""
    budgets = [int(text) if text.isdigit() else text for text in budget] if budget else None
    options = given(
        models=model, unrelated=unrelated, contenders=method, reference=reference, budgets=budgets, unit=unit,
        seeds=seeds, eval_rows=eval_rows,
        **{"training.steps": steps, "training.batch_size": batch_size, "tuning.trials": trials},
    )  # fmt: skip
    run(
        "compare", study=study, output=output, options=options, data=data, page=page, force=force, as_json=json_,
        sitting={
            "processes": jobs, "keep_adapters": keep_adapters, "dry_run": dry_run,
            "trust_remote_code": trust_remote_code,
        },
    )  # fmt: skip


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the merged model.")],
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, show_default="the trained model")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype to load the model in.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Merge an adapter into its base model. The merged model does not need apportion."""
    run(
        "merge", adapter=adapter, output=output, model=model, dtype=dtype, trust_remote_code=trust_remote_code,
        as_json=json_,
    )  # fmt: skip


@app.command()
def combine(
    adapters: Annotated[list[Path], typer.Argument(help="Folders of two or more adapters for the same model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the combined adapter.")],
    weights: Annotated[
        str | None, typer.Option(help="One weight per adapter: 0.5,0.5.", show_default="equal, summing to 1")
    ] = None,
    how: Annotated[str, typer.Option(help="cat (exact; ranks are summed) or linear (factors are summed).")] = "cat",
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, show_default="the trained model")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype to load the model in.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Combine several adapters into one."""
    run(
        "combine", adapters=adapters, output=output, weights=weights, how=how, model=model, dtype=dtype,
        trust_remote_code=trust_remote_code, as_json=json_,
    )  # fmt: skip


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the adapter in the new form.")],
    format_: Annotated[
        str, typer.Option("--format", help="What will read it: peft, vllm, sglang or gguf (llama.cpp).")
    ] = "peft",
    model: Annotated[
        str | None, typer.Option(help=f"The base model. {CONFIG_HELP}", show_default="the trained model")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the factors.", show_default="as stored")] = None,
    router: Annotated[
        Literal["refuse", "merge"],
        typer.Option(help="merge: also write a base model with the routers' part added (reads the base's weights)."),
    ] = "refuse",
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Write an adapter in a form that other software reads, with a README that tells how to serve it."""
    run(
        "export", adapter=adapter, output=output, format=format_, model=model, dtype=dtype, router=router,
        trust_remote_code=trust_remote_code, as_json=json_,
    )  # fmt: skip


@app.command(name="import")
def import_(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter of stock PEFT (LoRA).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the adapter.")],
    model: Annotated[
        str | None, typer.Option(help=f"The base model. {CONFIG_HELP}", show_default="the adapter's")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Turn an adapter of stock PEFT into one that can be combined, pruned, merged and exported here."""
    run(
        "import_", adapter=adapter, output=output, model=model, trust_remote_code=trust_remote_code, as_json=json_,
    )  # fmt: skip


@app.command()
def mask(
    file: Annotated[Path, typer.Argument(help="Mask file written by training.")],
    other: Annotated[Path | None, typer.Option("--with", help="Another mask, to show the overlap.")] = None,
    json_: Json = False,
) -> None:
    """Show where the trained entries of a sparse adapter are, and the overlap of two masks."""
    run("mask", file=file, other=other, as_json=json_)


@app.command()
def report(
    path: Annotated[
        Path, typer.Argument(help="Folder of a study or demonstration, a profile (.safetensors) or a plan (.json).")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Page to write: a .html file.")] = Path("report.html"),
    profile: Annotated[Path | None, typer.Option(help="Profile of the plan, to show both on one page.")] = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Write an HTML page of a study, demonstration, profile or plan. It works offline."""
    run("report", path=path, output=output, profile=profile, force=force, as_json=json_)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="File or folder written by apportion.")], json_: Json = False
) -> None:
    """Show what a file or folder is and what it contains."""
    run("show", path=path, as_json=json_)


@app.command()
def methods(json_: Json = False) -> None:
    """List the methods with a summary, their options and their source."""
    run("methods", as_json=json_)


def main() -> None:
    """Run the command line."""
    os.environ.update(CPU_CACHES | os.environ)  # before PyTorch starts; variables already set are kept
    app()
