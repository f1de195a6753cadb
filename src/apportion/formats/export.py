"""`export`: an adapter in the form that other software reads."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from apportion.errors import ConfigurationError
from apportion.formats import plain_lora
from apportion.formats.factors import SavedAdapter, read_adapter
from apportion.loading import DTYPES
from apportion.records.files import whole_folder
from apportion.records.names import suggestion
from apportion.records.outputs import check_output_folder


@dataclass(frozen=True)
class Format:
    """One form that adapters are written in.

    Args:
        summary: What reads it, in one line.
        check: Raises ConfigurationError for an adapter that the form cannot express.
        write: Writes an adapter that passed into a folder, its factors in a type or as they are stored.
    """

    summary: str
    check: Callable[[SavedAdapter], None]
    write: Callable[[SavedAdapter, Path, torch.dtype | None], None]


FORMATS: dict[str, Format] = {
    "peft": Format("PEFT, and whatever reads its LoRA: linear layers alone", plain_lora.check, plain_lora.write),
}


def register_format(name: str, form: Format) -> Format:
    """Make a format known under a name, to `export` and to the command line.

    Args:
        name: The name.
        form: The format.

    Returns:
        The same format.

    Raises:
        ValueError: another format has the name.
    """
    if FORMATS.setdefault(name, form) is not form:
        raise ValueError(f"there is a format {name!r} already.")
    return form


def export(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "peft",  # noqa: A002 - the word that users know
    dtype: str | None = None,
    model: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a saved adapter in the form that other software reads. The base model's weights are not needed.

    Args:
        path: The adapter's folder.
        output: The folder to write.
        format: One of `FORMATS`.
        dtype: ``float32``, ``bfloat16`` or ``float16``; the type in which the factors are stored if not given.
        model: The base model, if the plan does not name it or it lies elsewhere now; only its configuration is read.
        trust_remote_code: Run Python code that comes with the base model.

    Returns:
        The output folder.

    Raises:
        ConfigurationError: there is no such format, or it cannot express the adapter, which the message explains.
        AdapterError: the adapter is damaged.
        OutputExistsError: the output folder has something in it.
    """
    if format not in FORMATS:
        raise ConfigurationError(f"there is no format {format!r}.", fix=suggestion(format, FORMATS))
    if dtype is not None and dtype not in DTYPES:
        raise ConfigurationError(f"dtype={dtype!r} is not a type.", fix=suggestion(dtype, DTYPES))
    folder = check_output_folder(output, inputs=(path,), renamed=True)
    adapter = read_adapter(path, model, trust_remote_code=trust_remote_code)
    if adapter.config.on_top_of:
        raise ConfigurationError(
            f"the adapter in {os.fspath(path)} was trained on top of another one, so it does not fit the base model.",
            fix="merge it instead",
        )
    FORMATS[format].check(adapter)
    with whole_folder(folder) as temporary:
        FORMATS[format].write(adapter, temporary, None if dtype is None else DTYPES[dtype])
    return folder
