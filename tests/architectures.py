"""Every architecture whose experts transformers marks: a tiny configuration of it, or why there is none yet.

python tests/architectures.py     # writes docs/architectures.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"

# Whatever of these a configuration has is set; together they make every architecture tiny.
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    "max_position_embeddings": 64, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
    "moe_num_experts": 8, "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_top_k": 2,
    "top_k_experts": 2, "moe_k": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "expert_intermediate_size": 16,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_group": 1, "topk_group": 1, "decoder_sparse_step": 1, "mlp_only_layers": [], "sliding_window": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_dt_rank": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_dense_layers": 1,
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "index_n_heads": 8, "index_head_dim": 8, "index_topk": 8,
}  # fmt: skip

# Folder in transformers -> what its tiny configuration needs besides; "type" where the model type has another name.
SUPPORTED: dict[str, dict[str, Any]] = {
    "afmoe": {}, "aria": {"type": "aria_text"}, "axk1": {}, "axk2": {}, "bailing_hybrid": {"num_hidden_layers": 8},
    "cohere2_moe": {}, "deepseek_v2": {}, "deepseek_v3": {}, "deepseek_v32": {}, "dots1": {},
    "dots3_note": {"type": "dots3_note_text"}, "ernie4_5_moe": {}, "exaone_moe": {}, "flex_olmo": {}, "flint": {},
    "gemma4": {
        "type": "gemma4_text", "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
    },
    "glm4_moe": {}, "glm4_moe_lite": {}, "glm_moe_dsa": {}, "gpt_oss": {}, "granitemoe": {}, "granitemoe_swa": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]}, "granitemoeshared": {}, "hunyuan_v1_moe": {},
    "hy_v3": {}, "hy_v4": {}, "inkling2": {"type": "inkling2_text"}, "jamba": {}, "kolibri1": {}, "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]}, "mellum": {}, "mimo_v2_flash": {}, "minimax": {},
    "minimax_m2": {}, "minimax_m3_vl": {"type": "minimax_m3_vl_text"}, "mixtral": {}, "olmoe": {}, "phimoe": {},
    "qwen2_moe": {}, "qwen3_5_moe": {"type": "qwen3_5_moe_text", "num_hidden_layers": 4}, "qwen3_moe": {},
    "qwen3_next": {"num_hidden_layers": 4}, "solar_open": {}, "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

_VISION = "its language model is built through a vision-language class; not tried yet"
_CONFIGURATION = "no tiny configuration that runs was found yet"
NOT_TESTED: dict[str, str] = {
    "beam": "its tiny configuration has no Mixture-of-Experts layer; not looked into yet",
    "deepseek_ocr2": _VISION,
    "deepseek_v4": _CONFIGURATION,
    "diffusion_gemma": "no causal language model",
    "ernie4_5_vl_moe": _VISION,
    "glm4v_moe": _VISION,
    "glm5_next": _VISION,
    "inkling": _VISION,
    "kimi_linear": "its tiny model did not finish within a minute on a CPU",
    "mistral4": _VISION,
    "mistral_large4": _VISION,
    "muse_spark": _VISION,
    "nemotron_h": _CONFIGURATION,
    "openai_privacy_filter": "no causal language model",
    "qwen3_omni_moe": _VISION,
    "qwen3_vl_moe": _VISION,
    "qwen4_exp": _CONFIGURATION,
    "unlimited_ocr": _VISION,
}


def marked() -> set[str]:
    """List the folders of transformers with experts marked by `use_experts_implementation`."""
    root = Path(transformers.__file__).parent / "models"
    return {
        path.parent.name for path in root.glob("*/modeling_*.py") if "@use_experts_implementation" in path.read_text()
    }


def build(name: str) -> PreTrainedModel:
    """Build one tiny model with random weights, in evaluation mode."""
    changes = dict(SUPPORTED[name])
    config_class = CONFIG_MAPPING[changes.pop("type", name)]
    settings = {key: value for key, value in SMALL.items() if key in config_class.__dataclass_fields__}
    if "qk_rope_head_dim" in config_class.__dataclass_fields__:  # latent attention: heads have widths of their own
        settings.pop("head_dim", None)
        settings["num_key_value_heads"] = 4
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**settings | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    return model.float().eval()


def page() -> str:
    """Write the page of the docs."""
    lines = [
        "# Architectures",
        "",
        f"transformers {transformers.__version__} marks the experts of {len(marked())} architectures. For each in the",
        "first list a test builds a tiny model and checks that profile counts add up, that a new `hellora` adapter",
        "changes no logit by more than 1e-5, that every planned tensor gets a gradient and moves and nothing else",
        "does, that merged equals unmerged, and that an adapter loads as it was saved. Models whose experts are a",
        "`ModuleList` of linear layers are covered by a model of the tests' own, and DeepSeekMoE by its",
        "implementation here.",
        "",
        f"**All of this holds ({len(SUPPORTED)}):** " + ", ".join(f"`{name}`" for name in sorted(SUPPORTED)) + ".",
        "",
        f"**Not tested ({len(NOT_TESTED)}):**",
        "",
        "| architecture | why |",
        "| --- | --- |",
        *(f"| `{name}` | {reason} |" for name, reason in sorted(NOT_TESTED.items())),
        "",
        "Experts that transformers does not mark (Llama 4, DBRX, JetMoE) are refused by name.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
