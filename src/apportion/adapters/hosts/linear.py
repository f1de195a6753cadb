"""LoRA on a linear layer in the forms that PEFT lacks: several routed LoRA experts, a frozen A, a sparse B."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from apportion.adapters.balance import BalanceSums
from apportion.adapters.factors import factor_pair
from apportion.adapters.hosts.wrapped import WrappedModule
from apportion.adapters.specs import DEFAULT_OPTIONS, FactorOptions, FactorSpec
from apportion.linear_forms import compute_place

# Shapes: T tokens (over any leading dimensions), E LoRA experts, K of them used per token, R rank of each, N = E·R,
# I and O input and output width.


class LinearLora(WrappedModule):
    """A linear layer plus a gated sum of low-rank experts.

    ``y = W x + (alpha / r) Σ_{i in top-k} g_i(x) B_i A_i x`` with g the softmax of a linear router over the experts,
    its top-k renormalised. The sum equals one LoRA of rank E·r whose rank blocks are scaled by the gate, so two dense
    products serve any number of experts; nothing of the size tokens x experts x width is ever made. One expert is
    plain LoRA, without a router.

    Args:
        base_layer: A linear layer of any kind with ``in_features`` and ``out_features``.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_router")
    other_param_names = ("lora_dropout", "num_experts", "top_k", "scaling")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_router: Any = nn.ModuleDict()
        self.lora_dropout: Any = nn.ModuleDict()
        self.num_experts: dict[str, int] = {}
        self.top_k: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.balance: dict[str, BalanceSums] = {}

    def add_adapter(self, adapter_name: str, spec: FactorSpec, options: FactorOptions = DEFAULT_OPTIONS) -> None:
        """Add zero-initialised experts and a router under a new name.

        Args:
            adapter_name: The adapter's name.
            spec: What is planned for the layer.
            options: How the factors train and are stored; dropout applies to the experts' inputs, not the router's.
        """
        device, dtype = compute_place(self.base_layer)
        width_out, width_in = self.base_layer.out_features, self.base_layer.in_features
        a, b = factor_pair(spec, options, (width_out, width_in), device, dtype)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = a, b
        if spec.num_experts > 1:
            router = nn.Linear(width_in, spec.num_experts, bias=False, device=device, dtype=dtype)
            nn.init.kaiming_uniform_(router.weight, a=math.sqrt(5))
            self.lora_router[adapter_name] = router
        self.lora_dropout[adapter_name] = nn.Dropout(options.dropout) if options.dropout else nn.Identity()
        self.num_experts[adapter_name], self.top_k[adapter_name] = spec.num_experts, spec.top_k
        self.scaling[adapter_name] = spec.scale

    def adopt(self, layer: LoraLayer) -> None:
        """Take over the adapters of PEFT's own LoRA layer, each as one expert.

        Args:
            layer: The layer that this one replaces; it stands on the same base layer.
        """
        for name in layer.lora_A:
            self.lora_A[name], self.lora_B[name] = layer.lora_A[name], layer.lora_B[name]
            self.lora_dropout[name] = layer.lora_dropout[name]
            self.scaling[name] = layer.scaling[name]
            self.num_experts[name] = self.top_k[name] = 1
        self.merged_adapters = list(layer.merged_adapters)
        self._disable_adapters = layer.disable_adapters

    def run(self, active: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer with the named adapters.

        Args:
            active: Adapters that this layer has.
            *args: As the layer takes them; first the input, shape (..., I).
            **kwargs: As the layer takes them.

        Returns:
            Shape (..., O), in the layer's own type.
        """
        out_TO: Tensor = self.base_layer(*args, **kwargs)
        for adapter in active:
            out_TO = out_TO + self.delta(adapter, args[0]).to(out_TO.dtype)
        return out_TO

    def delta(self, adapter_name: str, x_TI: Tensor) -> Tensor:
        """Return what an adapter adds to the layer's output.

        Args:
            adapter_name: The adapter.
            x_TI: Shape (..., I).

        Returns:
            Shape (..., O), in the factors' type.

        Cost: 2 E R (I + O) + 2 E I operations per token.
        """
        a, b = self.lora_A[adapter_name], self.lora_B[adapter_name]
        x_TI = x_TI.to(a.weight.dtype)
        code_TN = a(self.lora_dropout[adapter_name](x_TI))
        if self.num_experts[adapter_name] > 1:
            gates_TE = self._gates(adapter_name, x_TI).to(code_TN.dtype) * self.scaling[adapter_name]
            code_TN = (code_TN.unflatten(-1, (gates_TE.shape[-1], -1)) * gates_TE.unsqueeze(-1)).flatten(-2)
        else:
            code_TN = code_TN * self.scaling[adapter_name]
        delta_TO: Tensor = b(code_TN)
        return delta_TO

    def _gates(self, adapter_name: str, x_TI: Tensor) -> Tensor:
        """Return every expert's weight, zero outside the top-k; shape (..., E), at least float32."""
        logits_TE = self.lora_router[adapter_name](x_TI)
        probabilities_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).softmax(-1)
        top = probabilities_TE.topk(self.top_k[adapter_name], dim=-1)
        weights_TK = top.values / top.values.sum(-1, keepdim=True)
        if self.training and adapter_name in self.balance:
            self.balance[adapter_name].add(probabilities_TE, top.indices)
        return torch.zeros_like(probabilities_TE).scatter(-1, top.indices, weights_TK)

    def add_to_weights(self, adapter_name: str, sign: float) -> None:
        """Add an adapter of one expert to the weight; of more, refuse.

        Args:
            adapter_name: The adapter.
            sign: 1 to add it, -1 to take it out.

        Raises:
            ValueError: the adapter has several experts.
        """
        if self.num_experts[adapter_name] > 1:
            raise ValueError(
                f"adapter {adapter_name!r} has {self.num_experts[adapter_name]} LoRA experts with a gate that depends "
                "on the input, so no weight equals it and it cannot be merged"
            )
        weight = self.base_layer.weight
        delta_OI = self.lora_B[adapter_name].weight @ self.lora_A[adapter_name].weight * self.scaling[adapter_name]
        weight.data += sign * delta_OI.to(weight.dtype)

    def is_finite(self, adapter_name: str) -> bool:
        """Tell whether all factors of an adapter are finite."""
        factors = (self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight)
        return all(bool(torch.isfinite(factor).all()) for factor in factors)
