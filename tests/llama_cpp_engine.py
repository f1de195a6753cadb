"""Run llama.cpp in this process, as exactly as it can: float32 everywhere, no flash attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from torch import Tensor


def serve(base: Path, adapters: Sequence[Path] = ()) -> xllamacpp.Server:
    """Start a server on a base model, with adapters at scale 1."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(base), 256, 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.warmup, params.verbosity, params.cpuparams.n_threads = False, 0, 1
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0) for path in adapters]
    return xllamacpp.Server(params)


def log_probs(server: xllamacpp.Server, tokens: Tensor, vocabulary: int, **request: Any) -> Tensor:
    """Give the log-probabilities of every token after a prompt of shape (1, tokens)."""
    answer = server.handle_completions(
        {
            "prompt": tokens[0].tolist(), "n_predict": 1, "n_probs": vocabulary, "temperature": 0,
            "cache_prompt": False, "post_sampling_probs": False, **request,
        }
    )  # fmt: skip
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    result = torch.full((vocabulary,), torch.nan)
    for entry in found:
        result[entry["id"]] = entry["logprob"]
    return result
