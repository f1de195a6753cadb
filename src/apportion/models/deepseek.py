"""DeepSeekMoE (``model_type: deepseek``) for transformers v5: DeepSeek-MoE-16B without remote code.

The published checkpoint comes with code for an old version of transformers. The architecture is Llama's (multi-head
attention, rotary positions, RMS norm) with another MLP after the first layers: shared experts, which process every
token, and routed experts, chosen by a softmax over all of them without renormalising the chosen weights.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations import use_experts_implementation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaPreTrainedModel

# Shapes: T tokens, K experts per token, E experts, D model width, F expert width.


class DeepseekConfig(LlamaConfig):
    """Configuration of DeepSeekMoE, with the names of the published ``config.json``.

    Args:
        moe_intermediate_size: Width of one expert.
        n_routed_experts: Number of routed experts per layer.
        n_shared_experts: Number of shared experts per layer, computed as one MLP of their total width.
        num_experts_per_tok: Routed experts per token.
        first_k_dense_replace: Number of initial layers with a dense MLP of `intermediate_size`.
        moe_layer_freq: Interval of Mixture-of-Experts layers after those.
        norm_topk_prob: Whether the chosen experts' weights are normalised to sum to one.
        scoring_func: Function from logits to weights; only ``softmax`` was published.
        aux_loss_alpha: Coefficient of the load-balancing loss in pre-training; not used here.
        seq_aux: Whether that loss was computed per sequence; not used here.
    """

    model_type = "deepseek"

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    num_experts_per_tok: int = 6
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether a layer's MLP is a Mixture of Experts.

        Args:
            layer: The decoder layer, from 0.

        Returns:
            True for a Mixture of Experts, False for a dense MLP.
        """
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


class DeepseekRouter(nn.Module):
    """Softmax over all experts, then top-k."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens.

        Args:
            hidden_TD: Shape (T, D).

        Returns:
            Logits (T, E), weights (T, K), expert ids (T, K).
        """
        logits_TE = nn.functional.linear(hidden_TD.float(), self.weight.float())
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK.to(hidden_TD.dtype), ids_TK


@use_experts_implementation
class DeepseekExperts(nn.Module):
    """The routed experts of one layer, stacked."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run every expert on its tokens, one expert after the other.

        Args:
            hidden_states: Shape (T, D).
            top_k_index: Expert ids, shape (T, K).
            top_k_weights: Routing weights, shape (T, K).

        Returns:
            Shape (T, D).
        """
        out_TD = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            rows, slots = torch.where(top_k_index == expert)
            gate, up = nn.functional.linear(hidden_states[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            down = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out_TD = out_TD.index_add(0, rows, down * top_k_weights[rows, slots, None])
        return out_TD


class DeepseekMoE(nn.Module):
    """Routed experts and shared experts, summed."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = DeepseekRouter(config)
        self.experts = DeepseekExperts(config)
        shared = LlamaConfig(**{**config.to_dict(), "intermediate_size": 0})
        shared.intermediate_size = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = LlamaMLP(shared)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Run the layer.

        Args:
            hidden_states: Shape (sequences, positions, D).

        Returns:
            The same shape.
        """
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, ids_TK = self.gate(hidden_TD)
        routed: Tensor = self.experts(hidden_TD, ids_TK, weights_TK)
        shared: Tensor = self.shared_experts(hidden_states)
        return routed.view_as(hidden_states) + shared


class _WithExperts:
    """Mixin that says that the experts' backend can be chosen; transformers caches Llama's answer for subclasses."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Return True."""
        return True


class DeepseekModel(_WithExperts, LlamaModel):
    """The decoder without its head."""

    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.layers):
            if config.is_moe_layer(number):
                layer.mlp = DeepseekMoE(config)
        self.post_init()


class DeepseekForCausalLM(_WithExperts, LlamaForCausalLM):
    """The decoder with its language-model head."""

    config_class = DeepseekConfig
    _no_split_modules: ClassVar[list[str]] = ["LlamaDecoderLayer"]

    def __init__(self, config: DeepseekConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # LlamaForCausalLM.__init__ would build a dense decoder first
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Initialise routers and experts like linear layers."""
        super()._init_weights(module)
        if isinstance(module, (DeepseekRouter, DeepseekExperts)):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=self.config.initializer_range)


def register() -> None:
    """Register the architecture and the names in its published checkpoints with transformers.

    The names per expert are those of Qwen2-MoE's checkpoints, so its conversion is reused.
    """
    AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
    AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    mapping = get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping("deepseek", mapping, overwrite=True)
