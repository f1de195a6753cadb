"""LoRA on some experts of a layer whose experts are stacked in one parameter.

The adapter works on activations: the rows routed to planned experts get ``(x Aᵀ) Bᵀ`` added, gate and up with factors
of their own. The merged weight is never built, and no gradient of a frozen weight is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apportion.adapters.grouped import grouped_linear, grouped_low_rank, reorder_rows
from apportion.adapters.wrapped import WrappedModule

# Shapes: T tokens, K experts a token, S = T·K routed rows sorted by expert, E experts, D model width, F expert width,
# I and O a projection's input and output width, R summed rank of the planned experts.


@dataclass(frozen=True)
class ExpertFactors:
    """What one adapter plans for one projection of a layer's experts.

    Args:
        experts: Ids of the planned experts, in rising order.
        ranks: Rank of each.
        scales: alpha / rank of each.
    """

    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]


AfterProduct = Callable[[str, Tensor, Tensor, Tensor], Tensor]


def run_experts(base: Any, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, after: AfterProduct) -> Tensor:
    """Run stacked experts on rows sorted by expert, with a look at every product.

    Args:
        base: A module marked by transformers' `use_experts_implementation`.
        hidden_TD: Shape (T, D).
        ids_TK: Expert ids, shape (T, K).
        weights_TK: Routing weights, shape (T, K).
        after: Called with each stacked parameter's name, its input and output rows and the rows of each expert; what it
            returns takes the output's place.

    Returns:
        Shape (T, D), in the tokens' order.
    """
    num_tokens, top_k = ids_TK.shape
    ids_S, order_S = ids_TK.reshape(-1).sort(stable=True)
    sizes_E = torch.bincount(ids_S, minlength=base.down_proj.shape[0])
    place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    x_SD = reorder_rows(hidden_TD, order_S, place_S, copies=top_k)

    def product(name: str, x_SI: Tensor) -> Tensor:
        out = grouped_linear(x_SI, getattr(base, name), sizes_E, transposed=base.is_transposed)
        out = out + getattr(base, f"{name}_bias")[ids_S] if base.has_bias else out
        return after(name, x_SI, out, sizes_E)

    inner = base._apply_gate(product("gate_up_proj", x_SD)) if base.has_gate else base.act_fn(product("up_proj", x_SD))
    out_SD = product("down_proj", inner)
    if base.has_post_expert_norm:
        out_SD = base.post_expert_norm(out_SD)
    out_SD = reorder_rows(out_SD, place_S, order_S) * weights_TK.reshape(-1, 1)
    summed: Tensor = out_SD.view(num_tokens, top_k, -1).sum(1)
    return summed.to(hidden_TD.dtype)


def split_gate_up(base: Any, fused_S2F: Tensor) -> tuple[Tensor, Tensor]:
    """Split what belongs to ``gate_up_proj`` into gate and up: halves, or every other column.

    Args:
        base: The experts module, for its layout.
        fused_S2F: Shape (S, 2F).

    Returns:
        Two views of shape (S, F).
    """
    if base.is_concatenated:
        width = fused_S2F.shape[1] // 2
        return fused_S2F[:, :width], fused_S2F[:, width:]
    return fused_S2F[:, 0::2], fused_S2F[:, 1::2]


def expert_view(base: Any, stacked: Tensor, name: str, expert: int) -> Tensor:
    """Give the view of one projection of one expert in a stacked tensor.

    Args:
        base: The experts module, for its layout.
        stacked: The stacked parameter that holds the projection, or a tensor of its shape such as its gradient.
        name: The projection (``gate_proj``, ``up_proj``, ``down_proj``).
        expert: The expert's id.

    Returns:
        Shape (O, I).
    """
    stored = stacked[expert].t() if base.is_transposed else stacked[expert]
    if name == "down_proj" or not base.has_gate:
        return stored
    half = stored.shape[0] // 2
    if base.is_concatenated:
        return stored[:half] if name == "gate_proj" else stored[half:]
    return stored[0::2] if name == "gate_proj" else stored[1::2]


class ExpertLora(WrappedModule):
    """An experts module of transformers, with LoRA on the planned experts' projections.

    Factors are stored stacked: ``lora_A[adapter][projection]`` has shape (R, I) and ``lora_B[adapter][projection]``
    (R, O), expert after expert in rising order. The checkpoint holds them expert by expert, in PEFT's shapes.

    Args:
        base_layer: A module marked by transformers' `use_experts_implementation`.
    """

    other_param_names = ("lora_dropout", "factors")
    lora_dropout: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_dropout = nn.ModuleDict()
        self.factors: dict[str, dict[str, ExpertFactors]] = {}

    def add_adapter(self, adapter_name: str, factors: Mapping[str, ExpertFactors], dropout: float = 0.0) -> None:
        """Add zero-initialised factors under a new name.

        Args:
            adapter_name: The adapter's name.
            factors: What is planned, by projection (``gate_proj``, ``up_proj``, ``down_proj``).
            dropout: Share of the adapter's inputs that is dropped in training.
        """
        weight = self.base_layer.down_proj
        kwargs: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        a = {name: torch.empty(sum(f.ranks), self._width(name)[0], **kwargs) for name, f in factors.items()}
        b = {name: torch.zeros(sum(f.ranks), self._width(name)[1], **kwargs) for name, f in factors.items()}
        for tensor in a.values():
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        self.factors[adapter_name] = dict(factors)
        self.lora_A[adapter_name] = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in a.items()})
        self.lora_B[adapter_name] = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in b.items()})
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the experts, with the active adapters.

        Args:
            hidden_states: Shape (T, D).
            top_k_index: Expert ids, shape (T, K).
            top_k_weights: Routing weights, shape (T, K).

        Returns:
            Shape (T, D).
        """
        if self.adapters_to_run():
            return run_experts(self.base_layer, hidden_states, top_k_index, top_k_weights, self.after_product)
        output: Tensor = self.base_layer(hidden_states, top_k_index, top_k_weights)
        return output

    def after_product(self, name: str, x_SI: Tensor, out_SO: Tensor, sizes_E: Tensor) -> Tensor:
        """Add the active adapters to the output of one stacked base matrix; `run_experts` calls this.

        Args:
            name: The parameter: ``gate_up_proj``, ``up_proj`` or ``down_proj``.
            x_SI: The matrix's input, rows sorted by expert.
            out_SO: Its output.
            sizes_E: Rows of each expert.

        Returns:
            Shape (S, O).
        """
        active = self.adapters_to_run()
        if name != "gate_up_proj":
            return self._add(out_SO, name, x_SI, sizes_E, active)
        if not any(part in self.factors[adapter] for adapter in active for part in ("gate_proj", "up_proj")):
            return out_SO
        gate, up = split_gate_up(self.base_layer, out_SO)
        gate = self._add(gate, "gate_proj", x_SI, sizes_E, active)
        up = self._add(up, "up_proj", x_SI, sizes_E, active)
        if self.base_layer.is_concatenated:
            return torch.cat([gate, up], dim=1)
        return torch.stack([gate, up], dim=2).flatten(1)

    def _add(self, out_SO: Tensor, name: str, x_SI: Tensor, sizes_E: Tensor, active: list[str]) -> Tensor:
        """Add the active adapters of one projection to the rows of their experts."""
        for adapter in active:
            factors = self.factors[adapter].get(name)
            if factors is None:
                continue
            ends = sizes_E.cumsum(0).tolist()
            spans = [(ends[e - 1] if e else 0, ends[e]) for e in factors.experts]
            rows = torch.cat([torch.arange(start, end, device=x_SI.device) for start, end in spans])
            a_RI, b_RO = self.lora_A[adapter][name], self.lora_B[adapter][name]
            x = self.lora_dropout[adapter](x_SI.index_select(0, rows).to(a_RI.dtype))
            scaled = a_RI * self._scales(factors, a_RI)
            delta = grouped_low_rank(x, scaled, b_RO, factors.ranks, [end - start for start, end in spans])
            out_SO = out_SO.index_add(0, rows, delta.to(out_SO.dtype))
        return out_SO

    @staticmethod
    def _scales(factors: ExpertFactors, like: Tensor) -> Tensor:
        """Give every row of A its expert's scale, shape (R, 1)."""
        pairs = zip(factors.ranks, factors.scales, strict=True)
        return torch.cat([like.new_full((rank, 1), scale) for rank, scale in pairs])

    def _width(self, name: str) -> tuple[int, int]:
        """Give a projection's input and output width."""
        base = self.base_layer
        stored = name if name == "down_proj" or not base.has_gate else "gate_up_proj"
        out_in = getattr(base, stored).shape[1:]
        width_out, width_in = reversed(out_in) if base.is_transposed else out_in
        return width_in, width_out // 2 if stored == "gate_up_proj" else width_out

    @torch.no_grad()
    def delta(self, adapter_name: str, name: str) -> Tensor:
        """Give what an adapter adds to one projection's weights.

        Args:
            adapter_name: The adapter.
            name: The projection.

        Returns:
            Shape (planned experts, O, I), in the factors' order and type.
        """
        factors = self.factors[adapter_name][name]
        a_RI, b_RO = self.lora_A[adapter_name][name], self.lora_B[adapter_name][name]
        parts = zip(a_RI.split(list(factors.ranks)), b_RO.split(list(factors.ranks)), factors.scales, strict=True)
        return torch.stack([(b.t() @ a) * scale for a, b, scale in parts])

    def is_finite(self, adapter_name: str) -> bool:
        """Tell whether all that an adapter would add to the weights is finite."""
        return all(bool(torch.isfinite(self.delta(adapter_name, name)).all()) for name in self.factors[adapter_name])

    @torch.no_grad()
    def add_to_weights(self, adapter_name: str, sign: float) -> None:
        """Add an adapter's deltas, times the sign, to the stacked weights."""
        for name, factors in self.factors[adapter_name].items():
            for expert, delta_OI in zip(factors.experts, self.delta(adapter_name, name), strict=True):
                stored = name if name == "down_proj" or not self.base_layer.has_gate else "gate_up_proj"
                target = expert_view(self.base_layer, getattr(self.base_layer, stored).data, name, expert)
                target += sign * delta_OI.to(target.dtype)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        """Tell PEFT where this module's adapters belong."""
        weight = base_layer.down_proj
        return weight.device, weight.dtype
