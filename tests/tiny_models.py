"""Random models of a few thousand parameters, one for each form of Mixture-of-Experts layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "max_position_embeddings": 64,
}

# What each adds to the forms covered.
TINY: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # shared experts with a scalar gate
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 1,
    },
    # a dense first layer, shared experts, and a router that selects by sigmoid, bias and groups
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    # transposed, interleaved, with biases and a gating of its own
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "layer_types": ["full_attention", "full_attention"],
    },
    "listed": {},
}


def checkpoint_activations(model: Any) -> None:
    """Have a model compute activations again in the backward pass; the method's name changed in transformers 5.23."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})


def build_tiny(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build one of the models with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    if name == "listed":
        model = ListedForCausalLM(ListedConfig())
    else:
        config = AutoConfig.for_model(name, **{**_COMMON, **TINY[name], **changes})
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # zero biases and near-zero weights would hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def build_dense() -> PreTrainedModel:
    """Build a random dense Llama."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_COMMON)).eval()


class ListedConfig(PreTrainedConfig):
    """A model whose experts are a `ModuleList`, as in many checkpoints' own code."""

    model_type = "listed"
    vocab_size: int = 64
    hidden_size: int = 32
    width: int = 16
    num_layers: int = 2
    num_experts: int = 6
    num_experts_per_tok: int = 2


class _Expert(nn.Module):
    def __init__(self, config: ListedConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.width, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.width, bias=False)
        self.w2 = nn.Linear(config.width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class _Router(nn.Module):
    """Selects by score plus bias, weighs by score: the choice cannot be read off the logits."""

    def __init__(self, config: ListedConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.randn(config.num_experts, config.hidden_size) * 0.3)
        self.bias = nn.Parameter(torch.randn(config.num_experts) * 0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        scores = nn.functional.linear(x, self.weight).sigmoid()
        ids = (scores + self.bias).topk(self.top_k, dim=-1).indices
        return ids, scores.gather(-1, ids), None


class _Block(nn.Module):
    def __init__(self, config: ListedConfig) -> None:
        super().__init__()
        self.gate = _Router(config)
        self.experts = nn.ModuleList(_Expert(config) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ids, weights, _ = self.gate(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == number)
            out = out.index_add(0, rows, expert(flat[rows]) * weights[rows, slots, None])
        return out.view_as(x)


class _Layer(nn.Module):
    def __init__(self, config: ListedConfig) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"v_proj": nn.Linear(config.hidden_size, config.hidden_size)})
        self.mlp = _Block(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn["v_proj"](x.cumsum(1))
        return x + self.mlp(nn.functional.layer_norm(x, x.shape[-1:]))


class ListedForCausalLM(PreTrainedModel):
    """Embeds, runs the layers, predicts."""

    config_class = ListedConfig
    _input_embed_layer = "embed"
    supports_gradient_checkpointing = False

    def __init__(self, config: ListedConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
