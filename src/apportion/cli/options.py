"""Options shared by several commands, and their help texts."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated

import typer

MODEL_HELP = "embedded, a hub id, a folder, or a .gguf file."
DATA_HELP = "A .jsonl, .json, .csv or .parquet file, a hub data set (id:config:split), or task:NAME[:train|:test]."
CONFIG_HELP = (
    "embedded, a hub id, a folder, a config.json, or one of these names: deepseek-moe-16b, "
    "deepseek-v2-lite, deepseek-v3, gpt-oss-20b, mixtral-8x22b, mixtral-8x7b, olmoe-1b-7b, qwen3-30b-a3b. "
    "Weights are not loaded."
)
TRUST_HELP = "Run the Python code that comes with a model. Use only if you trust its author."
Json = Annotated[bool, typer.Option("--json", help="Print only one JSON object to standard output.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an output file of another kind; never an input.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help=TRUST_HELP)]
MethodName = Annotated[str, typer.Option("--method", help="Planning method; list them with `apportion methods`.")]
Rank = Annotated[
    int, typer.Option(help="Rank of every adapter. marginal chooses ranks itself; there it sets the scale only.")
]
Alpha = Annotated[
    float | None, typer.Option(help="Scale numerator: output x alpha / rank.", show_default="twice the rank")
]


@dataclass(frozen=True)
class Loading:
    """How a command loads its model.

    Args:
        dtype: Dtype of the weights; None for the default of `load_model`.
        trust_remote_code: Run Python code that comes with the model.
        low_memory: Keep the weights on disk.
    """

    dtype: str | None
    trust_remote_code: bool
    low_memory: bool = False


class Dtype(enum.StrEnum):
    """Dtypes that a model can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Procedure(enum.StrEnum):
    """Ways to measure sensitivity."""

    one_pass = "one-pass"  # noqa: S105 - no password
    block_coordinate = "block-coordinate"
