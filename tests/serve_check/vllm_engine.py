"""Run exported adapters in vLLM, in an environment of its own, and write the log-probabilities after a prompt.

python vllm_engine.py OUTPUT BASE:RANK:ADAPTER[:ADAPTER...] ...

vLLM runs adapters on experts with Triton alone, which has no CPU backend on PyPI. So that one kernel is replaced by the
same products in PyTorch; it reads vLLM's own weights and adapter buffers. All else is vLLM: reading the folder, names,
packing, buffers, attention, routers.
"""

import gc
import os
import sys
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the replaced kernel must be in the process that runs

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

TOKENS = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(1))[0].tolist()
VOCABULARY = 64


def apply(self: Any, *, output: Any, hidden_states: Any, topk_weights: Any, topk_ids: Any, **others: Any) -> None:
    """Run the experts token by token, adapters included."""
    context, activation, w1, w2 = self._lora_context, others["activation"], others["w1"], others["w2"]
    slots = context.punica_wrapper.token_lora_indices
    for token, x in enumerate(hidden_states):
        total, slot = torch.zeros_like(x), int(slots[token])
        for weight, expert in zip(topk_weights[token], topk_ids[token].tolist(), strict=True):
            entered = w1[expert] @ x
            if self.w1_bias is not None:
                entered = entered + self.w1_bias[expert]
            if slot >= 0:
                parts = zip(context.w13_lora_a_stacked, context.w13_lora_b_stacked, strict=True)
                entered = entered + joined([b[slot, expert] @ (a[slot, expert] @ x) for a, b in parts], activation)
            inner = gated(entered, activation)
            left = w2[expert] @ inner
            if self.w2_bias is not None:
                left = left + self.w2_bias[expert]
            if slot >= 0:
                (a,), (b,) = context.w2_lora_a_stacked, context.w2_lora_b_stacked
                left = left + b[slot, expert] @ (a[slot, expert] @ inner)
            total = total + weight * left
        output[token] = total


def joined(parts: list[Any], activation: Any) -> Any:
    """Put what an adapter adds to gate and up together: in turns where the model has them so."""
    if len(parts) == 2 and activation == MoEActivation.SWIGLUOAI:
        return torch.stack(parts, dim=1).flatten()
    return torch.cat(parts)


def gated(entered: Any, activation: Any) -> Any:
    """Apply the gate."""
    if activation == MoEActivation.SWIGLUOAI:
        gate, up = entered[0::2].clamp(max=7.0), entered[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = entered.chunk(2)
    return torch.nn.functional.silu(gate) * up


def log_probs(base: str, rank: int, adapters: list[str]) -> dict[str, torch.Tensor]:
    """Serve all adapters of a base in one batch; give the log-probabilities of all tokens after the prompt."""
    llm = LLM(
        base, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=64, max_logprobs=VOCABULARY,
        enable_lora=True, max_lora_rank=rank, max_loras=len(adapters), max_num_seqs=8, kv_cache_memory_bytes=1 << 24,
        disable_log_stats=True, enable_prefix_caching=False,
    )  # fmt: skip
    settings = SamplingParams(temperature=0, max_tokens=1, logprobs=VOCABULARY, detokenize=False)
    requests = [LoRARequest(path, number, path) for number, path in enumerate(adapters, start=1)]
    prompts = [{"prompt_token_ids": TOKENS}] * len(requests)
    answers = llm.generate(prompts, settings, lora_request=requests, use_tqdm=False)
    # The base alone, in a batch of its own: beside adapters, vLLM 0.32 on a CPU gives its rows the last adapter.
    answers += llm.generate(prompts[:1], settings, use_tqdm=False)
    results = {}
    for name, answer in zip([*adapters, base], answers, strict=True):
        results[name] = torch.full((VOCABULARY,), torch.nan)
        for token, entry in answer.outputs[0].logprobs[0].items():
            results[name][token] = entry.logprob
    del llm
    gc.collect()
    return results


if __name__ == "__main__":
    TritonExperts.apply = apply
    out, *groups = sys.argv[1:]
    found: dict[str, torch.Tensor] = {}
    for group in groups:
        base, rank, *adapters = group.split(":")
        found |= log_probs(base, int(rank), adapters)
    save_file(found, out)
