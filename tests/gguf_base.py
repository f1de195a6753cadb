"""Base models as GGUF files, as llama.cpp's converter writes them, for the families that the tests serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

ARCHITECTURES = {
    "olmoe": "OLMOE", "mixtral": "LLAMA", "qwen3_moe": "QWEN3MOE", "gpt_oss": "GPT_OSS", "deepseek_v3": "DEEPSEEK2",
    "deepseek_v2": "DEEPSEEK2", "llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3",
}  # fmt: skip


def write_base(model: nn.Module, path: Path, tokens: list[str] | None = None, merges: list[str] | None = None) -> Path:
    """Write a model in float32, with a tokenizer or one of made-up tokens."""
    config: Any = model.config
    arch = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _add_sizes(writer, config)
    tokens = tokens or [f"<{number}>" for number in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(merges or ["< 3"])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in _tensors(model, config):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        writer.add_tensor(found, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write the sizes that llama.cpp builds the graph from."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    num_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if config.model_type.startswith("deepseek"):
        return _add_sizes_of_deepseek(writer, config)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if num_experts:
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    if config.model_type == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)
    return None


def _add_sizes_of_deepseek(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write the sizes of latent attention, which llama.cpp runs with one shared key, and of the experts."""
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    writer.add_expert_gating_func(
        getattr(gguf.ExpertGatingFuncType, "SIGMOID" if config.model_type == "deepseek_v3" else "SOFTMAX")
    )


def _tensors(model: nn.Module, config: Any) -> list[tuple[str, Tensor]]:
    """List a model's tensors under names that the name map knows, in llama.cpp's order of rows."""
    result = []
    for name, tensor in model.state_dict().items():
        module, _, last = name.rpartition(".")
        if "gate_up_proj" in name:
            result += _split(module, last, tensor, interleaved=config.model_type == "gpt_oss")
        elif name.endswith("experts.down_proj"):
            result.append((f"{name}.weight", tensor.mT if config.model_type == "gpt_oss" else tensor))
        elif name.endswith("experts.down_proj_bias"):
            result.append((f"{module}.down_proj.bias", tensor))
        elif name.endswith("kv_b_proj.weight"):
            result += _absorbed(module, tensor, config)
        elif ARCHITECTURES[config.model_type] == "LLAMA" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            result.append((name, tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)))
        elif name.endswith("sinks"):
            result.append((f"{name}.weight", tensor))
        elif name.endswith("e_score_correction_bias"):
            result.append((f"{module}.e_score_correction.bias", tensor))
        else:
            result.append((name, tensor))
    return result


def _split(module: str, last: str, tensor: Tensor, *, interleaved: bool) -> list[tuple[str, Tensor]]:
    """Split gate and up, stored as halves or, transposed, in turns."""
    kind = "bias" if last.endswith("bias") else "weight"
    if interleaved:
        gate, up = (tensor[..., first::2] for first in (0, 1))
        gate, up = (gate.mT, up.mT) if kind == "weight" else (gate, up)
    else:
        gate, up = tensor.chunk(2, dim=1)
    return [(f"{module}.gate_proj.{kind}", gate), (f"{module}.up_proj.{kind}", up)]


def _absorbed(module: str, tensor: Tensor, config: Any) -> list[tuple[str, Tensor]]:
    """Split the matrix that widens the latent keys and values."""
    per_head = tensor.view(config.num_attention_heads, -1, config.kv_lora_rank)
    k, v = torch.split(per_head, [config.qk_nope_head_dim, config.v_head_dim], dim=1)
    stem = module.removesuffix("kv_b_proj")
    return [(f"{stem}k_b_proj.weight", k.mT), (f"{stem}v_b_proj.weight", v)]


def write_embedded(model: nn.Module, tokenizer: Any, path: Path) -> Path:
    """Write the embedded model with its tokenizer."""
    spelled = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(spelled["vocab"], key=spelled["vocab"].__getitem__)
    tokens += [f"<unused{number}>" for number in range(len(tokens), model.config.vocab_size)]
    return write_base(model, path, tokens, [" ".join(pair) for pair in spelled["merges"]])
