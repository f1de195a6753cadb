"""Options that several commands share, and the words of their help."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated

import typer

MODEL_HELP = "embedded, a hub id, a folder, or a .gguf file."
DATA_HELP = "A .jsonl, .json, .csv or .parquet file, a hub data set (id:config:split), or task:NAME[:train|:test]."
CONFIG_HELP = (
    "embedded, a hub id, a folder, a config.json, or a model that apportion knows by name: deepseek-moe-16b, "
    "deepseek-v2-lite, deepseek-v3, gpt-oss-20b, mixtral-8x22b, mixtral-8x7b, olmoe-1b-7b, qwen3-30b-a3b. "
    "No weights are read."
)
TRUST_HELP = "Run the Python code that comes with a model. Only for authors that you trust."
METHODS_PANEL = "Method options"
SPARSE_PANEL = "Sparse plans (lori, hellori)"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file of another kind at the output; never an input.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help=TRUST_HELP)]
MethodName = Annotated[str, typer.Option("--method", help="How sites are chosen; `apportion methods` lists all.")]
Rank = Annotated[int, typer.Option(help="Rank of every adapter; of marginal, which chooses ranks, the scale alone.")]
Alpha = Annotated[
    float | None, typer.Option(help="Scale numerator: output x alpha / rank.", show_default="twice the rank")
]
Hot = Annotated[
    str | None,
    typer.Option(help="Experts kept a layer: 8, 25% or coverage=0.6.", show_default="8", rich_help_panel=METHODS_PANEL),
]
Criterion = Annotated[
    str | None,
    typer.Option(
        help="What makes an expert hot: count, mass, sensitivity or sensitivity_count.",
        show_default="count",
        rich_help_panel=METHODS_PANEL,
    ),
]
Targets = Annotated[
    str | None,
    typer.Option(
        help="What is adapted: any of attention, router, experts, shared, dense, or single projections such as "
        "experts.down, separated by commas.",
        show_default="all",
        rich_help_panel=METHODS_PANEL,
    ),
]

Layers = Annotated[
    str | None,
    typer.Option(
        help="Decoder layers that are adapted: 4-15 or 0,2,4-7.", show_default="all", rich_help_panel=METHODS_PANEL
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(
        help="Share of the matrices that are kept: of a group's by each task's vote (lora_smoe), of all (gradient).",
        show_default="0.6 of lora_smoe, 0.25 of gradient",
        rich_help_panel=METHODS_PANEL,
    ),
]
Per = Annotated[
    str | None,
    typer.Option(
        help="What gradient compares: the squared norm per matrix or per parameter.",
        show_default="matrix",
        rich_help_panel=METHODS_PANEL,
    ),
]
MaxRank = Annotated[
    int | None,
    typer.Option(
        help="The largest rank that marginal gives a matrix.",
        show_default="its smaller side",
        rich_help_panel=METHODS_PANEL,
    ),
]
Groups = Annotated[
    str | None,
    typer.Option(
        help="What is ranked together: attention/mlp, type or all.",
        show_default="attention/mlp",
        rich_help_panel=METHODS_PANEL,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k", help="LoRA experts that a token uses at a matrix.", show_default="2", rich_help_panel=METHODS_PANEL
    ),
]
Experts = Annotated[
    str | None,
    typer.Option(help="LoRA experts a matrix: 2-4-6-8 by depth (mola), 5 (uniform).", rich_help_panel=METHODS_PANEL),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="The most that may be spent: parameters (5000000), operations a token (flops=80000) or LoRA experts "
        "(experts=688).",
        rich_help_panel=METHODS_PANEL,
    ),
]
Sparsity = Annotated[
    float | None,
    typer.Option(
        help="Share of B that stays zero, with A frozen.",
        show_default="0.9 of lori and hellori, 0 of others",
        rich_help_panel=METHODS_PANEL,
    ),
]
KindRank = Annotated[
    int | None,
    typer.Option(
        help="Rank of this kind; the scale alpha / rank stays.", show_default="--rank", rich_help_panel=METHODS_PANEL
    ),
]


@dataclass(frozen=True)
class Loading:
    """How a command loads its model.

    Args:
        dtype: Number format; None leaves the choice to `load_model`.
        trust_remote_code: Run Python code that comes with the model.
        low_memory: Leave the weights on disk.
    """

    dtype: str | None
    trust_remote_code: bool
    low_memory: bool = False


class Dtype(enum.StrEnum):
    """Number formats that a model can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Procedure(enum.StrEnum):
    """Ways to measure sensitivity."""

    one_pass = "one-pass"  # noqa: S105 - no password
    block_coordinate = "block-coordinate"
