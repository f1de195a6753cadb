"""Load a model and its tokenizer by the names that every verb takes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from apportion.configurations import EMBEDDED, config_source
from apportion.errors import MissingDependencyError, ModelLoadError
from apportion.models.auto import auto_class, needs_remote_code, remote_code_refusal

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def embedded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the small Mixture-of-Experts model that ships with the package.

    Returns:
        The model in float32 and its tokenizer.

    Example:
        >>> import apportion
        >>> model, tokenizer = apportion.embedded()
        >>> model.config.num_experts
        16
    """
    return load_model(EMBEDDED)


def load_model(
    name: str | os.PathLike[str],
    dtype: str | None = None,
    *,
    offload: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a language model, or a model whose language model reads images or sound too, and its tokenizer.

    Args:
        name: ``embedded``, a hub id, a folder, or a ``.gguf`` file.
        dtype: ``float32``, ``bfloat16`` or ``float16``; where not given, float32 without a GPU and the checkpoint's
            own type with one.
        offload: A folder; the weights stay on disk, and in this folder where the checkpoint stores them otherwise, and
            each module reads its own when it runs. For forward passes alone.
        trust_remote_code: Run Python code that comes with the model. Without it such a model is refused, unless
            transformers has an implementation of its own.

    Returns:
        The model in evaluation mode, on the GPU where there is one, and a tokenizer that pads on the left.

    Raises:
        ModelLoadError: there is no such model, it cannot be read, or it comes with code that was not to be run.
        MissingDependencyError: a GGUF file was given and gguf is not installed.
    """
    text = os.fspath(name)
    folder, extra = _resolve(text)
    on_gpu = torch.cuda.is_available()
    torch_dtype = DTYPES[dtype] if dtype else ("auto" if on_gpu else torch.float32)
    if offload is not None:
        logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it says that weights are on disk
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **extra)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **extra)
        model = auto_class(config, trust_remote_code=trust_remote_code).from_pretrained(
            folder, dtype=torch_dtype, trust_remote_code=trust_remote_code, **extra, **_on_disk(offload)
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, ImportError) and extra:
            raise MissingDependencyError("GGUF files", package="gguf", extra="gguf") from error
        if needs_remote_code(error):
            raise remote_code_refusal(ModelLoadError, text) from error
        reason = str(error).strip().partition("\n")[0]
        raise ModelLoadError(
            f"the model {text!r} cannot be loaded.",
            found=reason,
            fix="give embedded, a folder with a model, a .gguf file, or a hub id while the hub can be reached",
        ) from error
    if extra:
        _forget_gguf(model)
    if not hasattr(model, model.base_model_prefix):
        model.base_model_prefix = "model"  # Llama 4 says language_model; trainers ask for the model without its head
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if offload is None:
        model = model.to(PartialState().device if on_gpu else "cpu")  # each of several processes has a GPU of its own
    return model.eval(), tokenizer


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    """Turn a name into what `from_pretrained` takes."""
    if name == EMBEDDED:
        return config_source(EMBEDDED), {}
    if name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise ModelLoadError(f"there is no file {name}.", fix="give the path of a .gguf file")
        return str(path.parent), {"gguf_file": path.name}
    return name, {}


def _on_disk(offload: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Say how `from_pretrained` leaves the weights on disk."""
    return {} if offload is None else {"device_map": {"": "disk"}, "offload_folder": os.fspath(offload)}


def _forget_gguf(model: PreTrainedModel) -> None:
    """Make a model read from GGUF, whose weights are dequantized, an ordinary one that can be saved."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
