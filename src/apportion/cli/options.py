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
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file of another kind at the output; never an input.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help=TRUST_HELP)]
MethodName = Annotated[str, typer.Option("--method", help="How sites are chosen; `apportion methods` lists all.")]
Rank = Annotated[int, typer.Option(help="Rank of every adapter; of marginal, which chooses ranks, the scale alone.")]
Alpha = Annotated[
    float | None, typer.Option(help="Scale numerator: output x alpha / rank.", show_default="twice the rank")
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
