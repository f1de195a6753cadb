"""`export`: an adapter in the form that other software reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from apportion.errors import ConfigurationError, OutputPathError
from apportion.formats import gguf_lora, peft_loaded, peft_lora, per_expert, sglang, vllm
from apportion.formats.factors import SavedAdapter, read_adapter
from apportion.formats.pairs import Pair
from apportion.formats.readme import README_FILE, Written, readme
from apportion.formats.routers import BASE_FOLDER, without_routers, write_base
from apportion.formats.verify import check_written
from apportion.loading import DTYPES
from apportion.records.files import whole_folder, write_text
from apportion.records.names import suggestion
from apportion.records.outputs import check_output_folder


@dataclass(frozen=True)
class Format:
    """One form that adapters are written in.

    Args:
        summary: What reads it, in one line.
        check: Raises ConfigurationError for an adapter that the form cannot express.
        write: Writes an adapter that passed into a folder, its factors in a type or as they are stored.
        read_back: Reads what `write` wrote, without pairs that are zero; nothing is compared if None.
        use: Tells how to use the folder, in Markdown: from the adapter, the folder and the base model's name.
    """

    summary: str
    check: Callable[[SavedAdapter], None]
    write: Callable[[SavedAdapter, Path, torch.dtype | None], None]
    read_back: Callable[[SavedAdapter, Path], Iterable[Pair]] | None = None
    use: Callable[[SavedAdapter, Path, str], str] | None = None


FORMATS: dict[str, Format] = {
    "peft": Format(
        "stock PEFT and transformers", peft_lora.check, peft_lora.write, peft_loaded.read_back, peft_lora.use
    ),
    "vllm": Format("vLLM", vllm.check, vllm.write, vllm.read_back, vllm.use),
    "sglang": Format("SGLang", sglang.check, sglang.write, per_expert.read_back, sglang.use),
    "gguf": Format("llama.cpp", gguf_lora.check, gguf_lora.write, gguf_lora.read_back, gguf_lora.use),
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
    router: Literal["refuse", "merge"] = "refuse",
    model: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a saved adapter in the form that other software reads, and compare what was written with the adapter.

    The base model's weights are not needed, unless routers are merged.

    Args:
        path: The adapter's folder.
        output: The folder to write: the adapter and a README that tells how to use it.
        format: One of `FORMATS`.
        dtype: ``float32``, ``bfloat16`` or ``float16``; the type in which the factors are stored if not given.
        router: ``merge`` also writes a copy of the base model with the routers' part of the adapter added, for engines
            that do not apply it; the rest is the adapter.
        model: The base model, if the plan does not name it or it lies elsewhere now; only its configuration is read,
            unless routers are merged.
        trust_remote_code: Run Python code that comes with the base model.

    Returns:
        The output folder.

    Raises:
        ConfigurationError: there is no such format, or the software that reads it would not apply all of the adapter.
        AdapterError: the adapter is damaged.
        OutputExistsError: the output folder has something in it.
        OutputPathError: the output folder is not writable, or its name is no plain text.
        OutputWriteError: what was written is not what the adapter says, for example in a type that is too small.
    """
    form = _known(format, dtype, router)
    folder = check_output_folder(output, inputs=(path,), renamed=True)
    if not os.fspath(folder).isprintable():
        raise OutputPathError(
            f"the name of the output folder {os.fspath(folder)!r} has characters that engines and READMEs cannot have.",
            fix="choose another folder",
        )
    adapter = read_adapter(path, model, trust_remote_code=trust_remote_code)
    if adapter.config.on_top_of:
        raise ConfigurationError(
            f"the adapter in {os.fspath(path)} was trained on top of another one, so it does not fit the base model.",
            fix="merge it instead",
        )
    written = without_routers(adapter) if router == "merge" else adapter
    form.check(written)
    with whole_folder(folder) as temporary:
        if router == "merge":
            write_base(adapter, temporary / BASE_FOLDER)
        torch_dtype = None if dtype is None else DTYPES[dtype]
        form.write(written, temporary, torch_dtype)
        if form.read_back is not None:
            check_written(written, form.read_back(written, temporary))
        base = os.fspath(folder / BASE_FOLDER) if router == "merge" else adapter.base
        use = None if form.use is None else form.use(written, folder, base)
        text = readme(written, temporary, Written(form.summary, base, torch_dtype, use))
        write_text(temporary / README_FILE, text)
    return folder


def _known(name: str, dtype: str | None, router: str) -> Format:
    """Check the arguments, and return the format."""
    if name not in FORMATS:
        raise ConfigurationError(f"there is no format {name!r}.", fix=suggestion(name, FORMATS))
    if dtype is not None and dtype not in DTYPES:
        raise ConfigurationError(f"dtype={dtype!r} is not a type.", fix=suggestion(dtype, DTYPES))
    if router not in ("refuse", "merge"):
        raise ConfigurationError(f"router={router!r} is neither refuse nor merge.")
    return FORMATS[name]
