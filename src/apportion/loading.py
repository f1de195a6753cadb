"""Load a model and its tokenizer by name."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from apportion.configurations import EMBEDDED, config_source
from apportion.errors import ApportionError, MissingDependencyError, ModelLoadError
from apportion.models.auto import auto_class, needs_remote_code, remote_code_refusal
from apportion.models.sources import find_model, first_line, read_config

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
    """Load a language model, or a multimodal model that contains one, and its tokenizer.

    Args:
        name: ``embedded``, a hub id, a folder, or a ``.gguf`` file.
        dtype: ``float32``, ``bfloat16`` or ``float16``. Default: float32 on CPU, the checkpoint's dtype on GPU.
        offload: Keep the weights on disk, and load each module's weights when it runs. Weights that the checkpoint
            stores in another form are written to this folder. Forward passes only.
        trust_remote_code: Run Python code that comes with the model. If False, models that need it are refused, unless
            transformers implements them.

    Returns:
        The model in evaluation mode, on the GPU if available, and a tokenizer that pads on the left.

    Raises:
        ModelLoadError: the model does not exist, cannot be read, or needs remote code that is not trusted.
        MissingDependencyError: a GGUF file was given and gguf is not installed.
    """
    text = os.fspath(name)
    folder, extra = _resolve(text)
    on_gpu = torch.cuda.is_available()
    torch_dtype = DTYPES[dtype] if dtype else ("auto" if on_gpu else torch.float32)
    if offload is not None:
        logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns that weights are on disk
    options = extra | {"trust_remote_code": trust_remote_code} | find_model(folder, [EMBEDDED], ModelLoadError)
    try:
        config = read_config(folder, ModelLoadError, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = auto_class(config, trust_remote_code=trust_remote_code).from_pretrained(
            folder, dtype=torch_dtype, **options, **_on_disk(offload)
        )
    except ApportionError:
        raise
    except Exception as error:  # transformers and tokenizers raise errors of many kinds
        if isinstance(error, ImportError) and extra:
            raise MissingDependencyError("GGUF files", package="gguf", extra="gguf") from error
        if needs_remote_code(error):
            raise remote_code_refusal(ModelLoadError, text) from error
        raise ModelLoadError(
            f"the model {text!r} cannot be loaded.",
            found=first_line(error),
            fix="give embedded, a folder with a model, a .gguf file, or a hub id (needs network access)",
        ) from error
    if extra:
        _forget_gguf(model)
    if not hasattr(model, model.base_model_prefix):
        model.base_model_prefix = "model"  # Llama 4 sets language_model; trainers need the model without its head
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if offload is None:
        model = model.to(PartialState().device if on_gpu else "cpu")  # one GPU per process
    return model.eval(), tokenizer


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    """Return the path and the extra arguments for `from_pretrained`."""
    if name == EMBEDDED:
        return config_source(EMBEDDED), {}
    if name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise ModelLoadError(f"the file {name} does not exist.", fix="give the path of a .gguf file")
        return str(path.parent), {"gguf_file": path.name}
    return name, {}


def _on_disk(offload: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that keep the weights on disk."""
    return {} if offload is None else {"device_map": {"": "disk"}, "offload_folder": os.fspath(offload)}


def _forget_gguf(model: PreTrainedModel) -> None:
    """Remove the quantization settings of a model loaded from GGUF: its weights are dequantized and can be saved."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
