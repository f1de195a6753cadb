"""LoRA on a linear layer in the forms that PEFT lacks: several routed LoRA experts, a frozen A, a sparse B."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from apportion.adapters.factors import FrozenFactor, SparseFactor
from apportion.adapters.wrapped import WrappedModule
from apportion.linear_forms import PLAIN_TYPES

# Shapes: T tokens (over any leading dimensions), E LoRA experts, R rank of each, I and O input and output width.


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

    def add_adapter(
        self,
        adapter_name: str,
        rank: int,
        scale: float,
        *,
        num_experts: int = 1,
        top_k: int = 1,
        dropout: float = 0.0,
        frozen_a: bool = False,
        stored_a: bool = False,
        indices: Tensor | None = None,
    ) -> None:
        """Add zero-initialised experts and a router under a new name.

        Args:
            adapter_name: The adapter's name.
            rank: Rank of every expert.
            scale: alpha / rank.
            num_experts: LoRA experts.
            top_k: LoRA experts that a token uses.
            dropout: Share of the experts' inputs that is dropped in training; the router sees them all.
            frozen_a: Whether A stays as it is drawn.
            stored_a: Whether checkpoints hold a frozen A.
            indices: Where B is sparse, its kept entries, laid out row by row (out, experts · rank).
        """
        weight = self.base_layer.weight
        plain = weight.dtype in PLAIN_TYPES
        dtype = weight.dtype if plain else torch.get_default_dtype()  # quantised weights are of types of their own
        kwargs: dict[str, Any] = {"bias": False, "device": weight.device, "dtype": dtype}
        width_in, width_out = self.base_layer.in_features, self.base_layer.out_features
        self.lora_A[adapter_name] = nn.Linear(width_in, num_experts * rank, **kwargs)
        self.lora_B[adapter_name] = nn.Linear(num_experts * rank, width_out, **kwargs)
        nn.init.kaiming_uniform_(self.lora_A[adapter_name].weight, a=math.sqrt(5))
        if num_experts > 1:
            self.lora_router[adapter_name] = nn.Linear(width_in, num_experts, **kwargs)
            nn.init.kaiming_uniform_(self.lora_router[adapter_name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[adapter_name].weight)
        if frozen_a:
            self.lora_A[adapter_name] = FrozenFactor(num_experts * rank, width_in, weight.device, stored=stored_a)
        if indices is not None:
            self.lora_B[adapter_name] = SparseFactor(width_out, num_experts * rank, indices, weight.device)
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.num_experts[adapter_name], self.top_k[adapter_name] = num_experts, top_k
        self.scaling[adapter_name] = scale

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
        out: Tensor = self.base_layer(*args, **kwargs)
        for adapter in active:
            out = out + self.delta(adapter, args[0]).to(out.dtype)
        return out

    def delta(self, adapter_name: str, x: Tensor) -> Tensor:
        """Give what an adapter adds to the layer's output.

        Args:
            adapter_name: The adapter.
            x: Shape (..., I).

        Returns:
            Shape (..., O), in the factors' type.

        Cost: 2 E R (I + O) + 2 E I operations a token.
        """
        a, b = self.lora_A[adapter_name], self.lora_B[adapter_name]
        x = x.to(a.weight.dtype)
        down = a(self.lora_dropout[adapter_name](x))
        if self.num_experts[adapter_name] > 1:
            gates = self._gates(adapter_name, x).to(down.dtype) * self.scaling[adapter_name]
            down = (down.unflatten(-1, (gates.shape[-1], -1)) * gates.unsqueeze(-1)).flatten(-2)
        else:
            down = down * self.scaling[adapter_name]
        delta: Tensor = b(down)
        return delta

    def _gates(self, adapter_name: str, x: Tensor) -> Tensor:
        """Give every expert's weight, zero outside the top-k; shape (..., E), at least float32."""
        logits = self.lora_router[adapter_name](x)
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        top = probabilities.topk(self.top_k[adapter_name], dim=-1)
        weights = top.values / top.values.sum(-1, keepdim=True)
        if self.training and adapter_name in self.balance:
            self.balance[adapter_name].add(probabilities, top.indices)
        return torch.zeros_like(probabilities).scatter(-1, top.indices, weights)

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
        delta = self.lora_B[adapter_name].weight @ self.lora_A[adapter_name].weight * self.scaling[adapter_name]
        weight.data += sign * delta.to(weight.dtype)

    def is_finite(self, adapter_name: str) -> bool:
        """Tell whether all factors of an adapter are finite."""
        factors = (self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight)
        return all(bool(torch.isfinite(factor).all()) for factor in factors)


class BalanceSums:
    """The balance loss of one routed layer over one forward pass.

    Switch form: E Σ_i f_i P_i with f the share of the routed slots that expert i takes and P its mean probability, over
    real tokens alone; 1 where all experts take the same share.
    """

    def __init__(self) -> None:
        self.real_T: Tensor | None = None
        self.loss: Tensor | None = None

    def add(self, probabilities: Tensor, ids: Tensor) -> None:
        """Take one forward pass.

        Args:
            probabilities: Of every expert, shape (..., E).
            ids: Of the experts used, shape (..., K).
        """
        num_experts = probabilities.shape[-1]
        probabilities, ids = probabilities.reshape(-1, num_experts), ids.reshape(-1, ids.shape[-1])
        real_T = probabilities.new_ones(len(ids))
        if self.real_T is not None and len(self.real_T) == len(ids):
            real_T = self.real_T.to(probabilities)
        num_real = real_T.sum().clamp(min=1)
        slots_TE = torch.zeros_like(probabilities).scatter(1, ids, 1.0)  # no wait for the device
        share_E = (slots_TE * real_T[:, None]).sum(0) / (num_real * ids.shape[-1])
        mean_E = (probabilities * real_T[:, None]).sum(0) / num_real
        self.loss = num_experts * (share_E * mean_E).sum()
