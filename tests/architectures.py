"""Every architecture whose experts transformers marks: a tiny configuration of it, or why there is none yet.

python tests/architectures.py     # writes docs/architectures.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from apportion.discovery import find_sites
from apportion.experts.forms import form_of
from apportion.models.auto import auto_class

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
    "index_n_heads": 8, "index_head_dim": 8, "index_topk": 8, "linear_head_dim": 8, "linear_num_heads": 4,
    "moe_hidden_size": 32, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "o_groups": 2, "o_lora_rank": 8, "hc_lowrank": 8, "index_kpool": 2,
    # of image and audio towers
    "depth": 1, "num_heads": 4, "out_hidden_size": 32, "text_hidden_size": 32, "patch_size": 4, "image_size": 16,
    "num_position_embeddings": 16, "projection_intermediate_size": 16, "projector_hidden_size": 16,
    "deepstack_visual_indexes": [0], "output_channels": 16, "downsample_channels": [16, 32], "mlp_dim": 16,
    "global_attn_indexes": [1], "window_size": 2, "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4,
    "encoder_ffn_dim": 16, "output_dim": 32, "downsample_hidden_size": 8, "num_mel_bins": 16,
}  # fmt: skip

_SECTIONS: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}

# Folder in transformers -> what its tiny configuration needs besides; "type" where the model type has another name.
SUPPORTED: dict[str, dict[str, Any]] = {
    "afmoe": {}, "aria": {"type": "aria_text"}, "axk1": {}, "axk2": {}, "bailing_hybrid": {"layer_group_size": 2},
    "beam": {"mlp_layer_types": ["dense", "sparse"], "n_group": 2, "topk_group": 1}, "cohere2_moe": {},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}}, "deepseek_v2": {}, "deepseek_v3": {},
    "deepseek_v32": {},
    "deepseek_v4": {
        "head_dim": 8, "partial_rotary_factor": 0.5, "num_key_value_heads": 1, "mlp_layer_types": ["hash_moe", "moe"],
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots1": {},
    "dots3_note": {"type": "dots3_note_text"}, "ernie4_5_moe": {},
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [16, 16], "rope_parameters": _SECTIONS | {"mrope_section": [1, 1, 2]}},
    },
    "exaone_moe": {}, "flex_olmo": {}, "flint": {},
    "gemma4": {
        "type": "gemma4_text", "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
    },
    "glm4_moe": {}, "glm4_moe_lite": {},
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": _SECTIONS | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
        },
    },
    "glm5_next": {
        "text_config": {
            "qk_rope_head_dim": 0, "num_hidden_layers": 4, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        },
    },
    "glm_moe_dsa": {}, "gpt_oss": {}, "granitemoe": {}, "granitemoe_swa": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]}, "granitemoeshared": {}, "hunyuan_v1_moe": {},
    "hy_v3": {}, "hy_v4": {}, "inkling": {"type": "inkling_text"}, "inkling2": {"type": "inkling2_text"},
    "jamba": {}, "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]}, "kolibri1": {}, "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]}, "mellum": {}, "mimo_v2_flash": {}, "minimax": {},
    "minimax_m2": {}, "minimax_m3_vl": {"type": "minimax_m3_vl_text"}, "mistral4": {}, "mistral_large4": {},
    "mixtral": {},
    "muse_spark": {"audio_config": {"patch_sizes": [4, 2], "hidden_sizes": [8, 16], "depths": [1, 1]}},
    "nemotron_h": {
        "layer_types": ["linear_attention", "moe", "full_attention", "moe"], "num_hidden_layers": 4, "n_groups": 1,
    },
    "olmoe": {},
    "openai_privacy_filter": {"auto": AutoModelForTokenClassification, "num_labels": 64},
    "phimoe": {},
    "qwen2_moe": {}, "qwen3_5_moe": {"type": "qwen3_5_moe_text", "num_hidden_layers": 4}, "qwen3_moe": {},

    "qwen3_next": {"num_hidden_layers": 4}, "qwen3_omni_moe": {"type": "qwen3_omni_moe_thinker"}, "qwen3_vl_moe": {},
    "qwen4_exp": {
        "type": "qwen4_exp_text", "layer_types": ["linear_attention", "full_attention"], "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2,
    },
    "solar_open": {}, "unlimited_ocr": {}, "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# Families whose experts transformers does not mark, and that `experts/forms.py` describes.
UNMARKED: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "rope_parameters": _SECTIONS,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "llama4": {"type": "llama4_text", "intermediate_size_mlp": 16},
}  # fmt: skip
# Model type -> the class that transformers builds it with, and the module that the refusal names.
REFUSED: dict[str, tuple[Any, str]] = {
    "jetmoe": (AutoModelForCausalLM, "JetMoeParallelExperts"),
    "longcat_flash": (AutoModelForCausalLM, "LongcatFlashExperts"),
    "nllb-moe": (AutoModelForSeq2SeqLM, "NllbMoeExperts"),
    "switch_transformers": (AutoModelForSeq2SeqLM, "SwitchTransformersExperts"),
}
NOT_SUPPORTED: dict[str, str] = {
    "diffusion_gemma": "generates by denoising blocks of text: its forward pass takes no labels and gives no loss",
}


def marked() -> set[str]:
    """List the folders of transformers with experts marked by `use_experts_implementation`."""
    root = Path(transformers.__file__).parent / "models"
    return {
        path.parent.name for path in root.glob("*/modeling_*.py") if "@use_experts_implementation" in path.read_text()
    }


def tiny_config(config_class: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    """Make a configuration small, and those inside it; changes to an inner one stand under its name."""
    fields = config_class.__dataclass_fields__
    settings = {key: value for key, value in SMALL.items() if key in fields}
    if "qk_rope_head_dim" in fields:  # latent attention: heads have widths of their own
        settings.pop("head_dim", None)
        settings["num_key_value_heads"] = 4
    inner = {
        key: tiny_config(CONFIG_MAPPING[spec.model_type], dict(changes.get(key, {})))
        for key, spec in config_class.sub_configs_defaults.items()
    }
    return config_class(**settings | changes | inner)


def build_refused(model_type: str) -> PreTrainedModel:
    """Build one of the models that are refused, without weights."""
    auto, _ = REFUSED[model_type]
    with torch.device("meta"):
        return auto.from_config(tiny_config(CONFIG_MAPPING[model_type], {}))


def build(name: str) -> PreTrainedModel:
    """Build one tiny model with random weights, in evaluation mode."""
    changes = dict((SUPPORTED | UNMARKED)[name])
    auto = changes.pop("auto", None)
    config = tiny_config(CONFIG_MAPPING[changes.pop("type", name)], changes)
    torch.manual_seed(0)
    model = (auto or auto_class(config)).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # a table from token to experts, zero until a checkpoint fills it
                buffer.copy_(torch.arange(buffer.numel()).view_as(buffer) % 8)
    return model.float().eval()


def describe(name: str) -> list[str]:
    """Give one architecture's row of the table, read off its tiny model."""
    model = build(name)
    layout = find_sites(model)
    block = layout.blocks[0]
    form = form_of(model.get_submodule(block.name))
    entering = [form.projections[projection] for projection in form.projections if projection != "down_proj"]
    stored = "experts under one another" if "mlp.w1" in form.entering else "stacked"
    notes = {
        "transposed": entering[0].transposed,
        "gate and up interleaved": any(stacked.rows.step for stacked in entering),
        "no gate": len(entering) == 1,
        "biases": form.has_bias,
        "a norm after each expert": form.norm is not None,
        "called with all experts' rows": form.called == "stacked",
    }
    kinds = {site.kind for site in layout.others}
    stacked_shared = any(
        "SharedExperts" in type(module).__name__ and hasattr(module, "n_shared_experts") for module in model.modules()
    )
    routers = sum(site.kind == "router" for site in layout.others) // len(layout.blocks)
    return [
        f"`{name}`",
        f"`{type(model).__name__}`",
        ", ".join([stored, *(note for note, holds in notes.items() if holds)]),
        "frozen (stacked)" if stacked_shared else "yes" if "shared" in kinds else "no",
        "yes" if "dense" in kinds else "no",
        "a matrix" if routers == 1 else f"{routers} matrices",
    ]


def page() -> str:
    """Write the page of the docs."""
    rows = [describe(name) for name in sorted(SUPPORTED | UNMARKED)]
    lines = [
        "# Architectures",
        "",
        f"transformers {transformers.__version__} marks the experts of {len(marked())} architectures."
        f" {len(SUPPORTED)} of them work here, and {len(UNMARKED)} that it",
        "does not mark. For each in the table a test builds a tiny model and checks that",
        "",
        "- profile counts add up to tokens times top-k in every layer,",
        "- a new `hellora` adapter changes no logit by more than 1e-5,",
        "- every planned tensor gets a gradient and moves, and nothing else does,",
        "- an adapter loads as it was saved, and merged equals unmerged.",
        "",
        "Models whose experts are a `ModuleList` of linear layers are covered by a model of the tests' own, and",
        "DeepSeekMoE by its implementation here. The table is read off the tiny models.",
        "",
        "| architecture | class | experts | shared experts | dense layers | router |",
        "| --- | --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "Sites of stacked experts have the same names everywhere: `...experts.5.gate_proj`, `up_proj`, `down_proj`,",
        "also where a model calls its projections otherwise (DBRX: `w1` is gate, `v1` is up, `w2` is down).",
        "",
        "## What is left out",
        "",
        "- Of models that read images or sound, everything but the language model: text gives the towers no gradient.",
        "  `apportion` builds and loads them whole. ERNIE 4.5 VL keeps experts for images in its language model; these",
        "  are left out too.",
        "- Matrices that an adapter would not train or that are no weight matrices in the usual sense: the indexers of",
        "  sparse attention, Mamba's `dt_proj`, hyper-connections, the scalar gate of a shared expert.",
        "- Inkling's shared experts, which are stacked in one parameter and stay frozen.",
        "",
        "## Known limits",
        "",
        "- `openai_privacy_filter` is a token classifier: profiles, plans and adapters work, `apportion train` is for",
        "  models that write text.",
        "- TRL computes the loss from the last hidden states by itself and leaves out the scale that Inkling puts on",
        "  its logits. Train Inkling with a trainer that takes the model's own loss.",
        "- Inkling's image tower needs SciPy; the test builds its language model alone. Of Qwen3-Omni the test builds",
        "  the thinker, which is the part that reads and writes text.",
        "",
        "## What is refused, by name",
        "",
        "| architecture | why |",
        "| --- | --- |",
        *(f"| `{name}` | {reason} |" for name, reason in sorted(NOT_SUPPORTED.items())),
        *(
            f"| `{name}` | its experts (`{experts}`) are stored in a form of their own |"
            for name, (_, experts) in sorted(REFUSED.items())
        ),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
