"""Every command's options. The work is in the module of the command's name, which is loaded only when it is called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

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
    help="Spend a fine-tuning budget where a model uses it: measure, then apportion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Handle what belongs to no command."""
    if version:
        typer.echo(f"apportion {__version__}")
        raise typer.Exit


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for results, plans and adapters.")] = Path(
        "apportion-demo"
    ),
    quick: Annotated[bool, typer.Option(help="A tenth of the training, to see that all works.")] = False,
    json_: Json = False,
) -> None:
    """Profile, plan, train and compare five methods on the embedded model: the whole story."""
    run("demo", output=output, quick=quick, as_json=json_)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    data: Annotated[list[str], typer.Option(help=f"[TASK=]DATA, may be repeated. {DATA_HELP}")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The profile: a .safetensors file.")],
    samples: Annotated[int, typer.Option(min=1, help="Rows read of each data set.")] = 256,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a row that are kept.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a batch.")] = 16,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure every matrix's squared gradient norm too.")
    ] = False,
    sensitivity_procedure: Annotated[
        Procedure | None,
        typer.Option(
            help="one-pass on the frozen model, or block-coordinate as LoRA-SMoE's released code does.",
            show_default="one-pass",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of generated tasks.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format to load the model in.")] = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Leave the weights on disk, and read a module's when it runs.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Measure where a model routes the tokens of your data."""
    run(
        "profile", model=model, data=data, output=output, samples=samples, max_length=max_length, batch_size=batch_size,
        sensitivity=sensitivity, procedure=sensitivity_procedure, seed=seed, force=force,
        loading=Loading(dtype, trust_remote_code, low_memory), as_json=json_,
    )  # fmt: skip


@app.command()
@option_flags(_METHOD_OPTIONS)
def plan(
    profile: Annotated[Path, typer.Argument(help="A profile.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan: a .json file.")],
    method: MethodName = "hellora",
    rank: Rank = 32,
    alpha: Alpha = None,
    seed: Annotated[int, typer.Option(help="Seed of methods that draw at random.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="Draw layers by experts into this .svg file.")] = None,
    force: Force = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """Decide from a profile which sites get an adapter, and say what that costs."""
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
    seed: Annotated[int, typer.Option(help="Seed of methods that draw at random.")] = 0,
    profile: Annotated[Path | None, typer.Option(help="A profile, for the true shares of tokens.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """Count what a method would cost on a model, from its configuration alone."""
    run(
        "cost", model=model, method=method, rank=rank, seed=seed, profile=profile, options=options,
        trust_remote_code=trust_remote_code, as_json=json_,
    )  # fmt: skip


@app.command()
@option_flags({"train": SparseTraining})
def train(
    plan: Annotated[Path, typer.Argument(help="A plan.")],
    data: Annotated[list[str], typer.Option(help=f"[TASK=]DATA, may be repeated. {DATA_HELP}")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the adapter and its checkpoints.")],
    weights: Annotated[
        str | None,
        typer.Option(help="Shares of the tasks in the mixture, such as a=2,b=1.", show_default="their numbers of rows"),
    ] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, show_default="the profiled one")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Rows read of each data set.", show_default="all; 1000 of a task")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 3.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; overrides --epochs.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-4,
    batch_size: Annotated[int, typer.Option(help="Rows a device and step.")] = 16,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches an optimizer step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens of a row that are kept.")] = 1024,
    dropout: Annotated[float, typer.Option(help="Share of the adapters' inputs dropped; routers are left out.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.0,
    router_aux_loss: Annotated[float, typer.Option(help="Weight of the model's load-balancing loss.")] = 0.0,
    balance_loss: Annotated[float, typer.Option(help="Weight of the balance loss of routed LoRA experts.")] = 0.0,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    on_top_of: Annotated[
        Path | None, typer.Option(help="An adapter's folder: it is merged into the model first, and stays.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="A mask to train under, instead of finding one.", rich_help_panel=SparseTraining.panel),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the adapters' start and of the rows' order.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format to load the model in.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in the folder stopped.")] = False,
    json_: Json = False,
    **sparse: Any,
) -> None:
    """Train a plan's adapters (TRL's SFTTrainer; the loss counts completions alone)."""
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
        typer.Option(help=f"[TASK=]DATA, may be repeated. {DATA_HELP} A task's test split where none is named."),
    ],
    adapter: Annotated[Path | None, typer.Option(help="Folder of an adapter.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Rows read of each data set.")] = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a batch.")] = 32,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a row that count.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of generated tasks.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format to load the model in.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Score a model: loss and perplexity, and exact match where rows have an answer."""
    run(
        "evaluate", model=model, data=data, adapter=adapter, samples=samples, batch_size=batch_size,
        max_length=max_length, seed=seed, dtype=dtype, trust_remote_code=trust_remote_code, as_json=json_,
    )  # fmt: skip


@app.command()
def compare(
    study: Annotated[
        Path | None, typer.Argument(help="A study's .toml file, or the folder of one, to summarise it again.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for results.", show_default="build/NAME")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"May be repeated. {MODEL_HELP}")] = None,
    data: Annotated[list[str] | None, typer.Option(help=f"[TASK=]DATA, may be repeated. {DATA_HELP}")] = None,
    unrelated: Annotated[str | None, typer.Option(help="Data whose loss tells what was forgotten.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A method, or full for full fine-tuning; may be repeated.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="What all others are compared with.", show_default="the first method")
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="A number, or METHOD:RANK for as many as that takes; may be repeated.")
    ] = None,
    unit: Annotated[
        str | None, typer.Option(help="What a budget counts: parameters or flops.", show_default="parameters")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of every method, task and budget.", show_default="5")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps a run.", show_default="40")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.", show_default="32")] = None,
    trials: Annotated[int | None, typer.Option(help="Learning rates tried a method.", show_default="5")] = None,
    eval_rows: Annotated[int | None, typer.Option(help="Held-out rows a score.", show_default="200")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, in processes of their own.")] = 1,
    page: Annotated[
        Path | None, typer.Option(help="Write a Markdown page with tables and plots, and its JSON.")
    ] = None,
    keep_adapters: Annotated[bool, typer.Option("--keep-adapters", help="Keep every run's adapter.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure and plan, say how equal the budgets are, and train nothing.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Compare methods at equal budgets, over seeds, with statistics; finished runs are never repeated."""
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
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, show_default="the trained one")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format to load the model in.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Fold an adapter into its base: a plain model that needs no apportion."""
    run(
        "merge", adapter=adapter, output=output, model=model, dtype=dtype, trust_remote_code=trust_remote_code,
        as_json=json_,
    )  # fmt: skip


@app.command()
def combine(
    adapters: Annotated[list[Path], typer.Argument(help="Folders of two or more adapters of one model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the combined adapter.")],
    weights: Annotated[
        str | None, typer.Option(help="One weight an adapter: 0.5,0.5.", show_default="equal, adding up to 1")
    ] = None,
    how: Annotated[str, typer.Option(help="cat (exact; ranks add up) or linear (factors are added).")] = "cat",
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, show_default="the trained one")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format to load the model in.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Make one adapter of several tasks' adapters."""
    run(
        "combine", adapters=adapters, output=output, weights=weights, how=how, model=model, dtype=dtype,
        trust_remote_code=trust_remote_code, as_json=json_,
    )  # fmt: skip


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the adapter in the new form.")],
    format_: Annotated[str, typer.Option("--format", help="peft: plain LoRA, for adapters of linear layers.")] = "peft",
    model: Annotated[
        str | None, typer.Option(help=f"The base model. {CONFIG_HELP}", show_default="the trained one")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format of the factors.", show_default="as stored")] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Write an adapter in a form that other software reads; the base model's weights are not needed."""
    run(
        "export", adapter=adapter, output=output, format=format_, model=model, dtype=dtype,
        trust_remote_code=trust_remote_code, as_json=json_,
    )  # fmt: skip


@app.command()
def mask(
    file: Annotated[Path, typer.Argument(help="A mask that training wrote.")],
    other: Annotated[Path | None, typer.Option("--with", help="Another mask: how far do they overlap?")] = None,
    json_: Json = False,
) -> None:
    """Show where a sparse adapter's trained entries are, and how far two masks overlap."""
    run("mask", file=file, other=other, as_json=json_)


@app.command()
def report(
    path: Annotated[
        Path, typer.Argument(help="A study's or a demonstration's folder, a profile (.safetensors) or a plan (.json).")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page: a .html file.")] = Path("report.html"),
    profile: Annotated[
        Path | None, typer.Option(help="The profile that a plan was made from, to show both in one page.")
    ] = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Show a study, a demonstration, a profile or a plan as one HTML page that needs no network."""
    run("report", path=path, output=output, profile=profile, force=force, as_json=json_)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="Any file or folder that apportion wrote.")], json_: Json = False
) -> None:
    """Say what a file or folder is, and what it holds."""
    run("show", path=path, as_json=json_)


@app.command()
def methods(json_: Json = False) -> None:
    """List every method: its options, its source, one line."""
    run("methods", as_json=json_)


def main() -> None:
    """Run the command line."""
    os.environ.update(CPU_CACHES | os.environ)  # before PyTorch starts; what is set stays
    app()
