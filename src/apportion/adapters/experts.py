"""LoRA on some experts of a layer whose experts are stacked in one parameter.

The adapter works on activations: the rows routed to planned experts get ``(x Aᵀ) Bᵀ`` added, gate and up with factors
of their own. The merged weight is never built, and no gradient of a frozen weight is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apportion.adapters.grouped import grouped_linear, grouped_low_rank, reorder_rows
from apportion.adapters.wrapped import WrappedModule
from apportion.expert_forms import ExpertForm, form_of

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


class ExpertLora(WrappedModule):
    """A module of stacked experts, with LoRA on the planned experts' projections.

    Factors are stored stacked: ``lora_A[adapter][projection]`` has shape (R, I) and ``lora_B[adapter][projection]``
    (R, O), expert after expert in rising order. The checkpoint holds them expert by expert, in PEFT's shapes.

    Args:
        base_layer: A module that `form_of` knows.
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
        a, b = {}, {}
        for name, planned in factors.items():
            weights_EOI = self._form().weights(self.base_layer, name)
            kwargs: dict[str, Any] = {"device": weights_EOI.device, "dtype": weights_EOI.dtype}
            a[name] = torch.empty(sum(planned.ranks), weights_EOI.shape[2], **kwargs)
            b[name] = torch.zeros(sum(planned.ranks), weights_EOI.shape[1], **kwargs)
        for tensor in a.values():
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        self.factors[adapter_name] = dict(factors)
        self.lora_A[adapter_name] = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in a.items()})
        self.lora_B[adapter_name] = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in b.items()})
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Run the experts, with the active adapters.

        Args:
            hidden_states: Shape (T, D); or (E·T, D), one copy of the tokens an expert, where the module is called so.
            top_k_index: Expert ids, shape (T, K).
            top_k_weights: Routing weights, shape (T, K).

        Returns:
            The shape of `hidden_states`.
        """
        active = self.adapters_to_run()
        if not active:
            routing = () if top_k_index is None else (top_k_index, top_k_weights)
            output: Tensor = self.base_layer(hidden_states, *routing)
            return output
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        if top_k_index is None or top_k_weights is None:
            summed = self._adapted_copies(hidden, active)
        else:
            summed = self._adapted(hidden, top_k_index, top_k_weights, active)
        return summed.to(hidden_states.dtype).view_as(hidden_states)

    def _adapted(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, active: list[str]) -> Tensor:
        """Sort the routed rows by expert, run base and adapters on them, and put the sums back in the tokens' order."""
        num_tokens, top_k = ids_TK.shape
        ids_S, order_S = ids_TK.reshape(-1).sort(stable=True)
        sizes_E = torch.bincount(ids_S, minlength=self._form().num_experts)
        place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
        x_SD = reorder_rows(hidden_TD, order_S, place_S, copies=top_k)
        out_SD = self._run(x_SD, sizes_E, active)
        out_SD = reorder_rows(out_SD, place_S, order_S) * weights_TK.reshape(-1, 1)
        return out_SD.view(num_tokens, top_k, -1).sum(1)

    def _adapted_copies(self, copies_ETD: Tensor, active: list[str]) -> Tensor:
        """Run base and adapters on the rows that were routed: the others are zero, and stay so."""
        routed = copies_ETD.any(dim=1)
        rows_S = routed.nonzero().squeeze(1)
        sizes_E = routed.view(self._form().num_experts, -1).sum(1)
        out_SD = self._run(copies_ETD.index_select(0, rows_S), sizes_E, active)
        return torch.zeros_like(copies_ETD).index_copy(0, rows_S, out_SD.to(copies_ETD.dtype))

    def _run(self, x_SD: Tensor, sizes_E: Tensor, active: list[str]) -> Tensor:
        """Run the experts on rows that are sorted by expert."""
        base, form = self.base_layer, self._form()
        entered = {name: self._product(name, x_SD, sizes_E, active) for name in form.entering}
        inner_SF = form.activate(base, entered)
        out_SD = self._product(form.projections["down_proj"].parameter, inner_SF, sizes_E, active)
        return getattr(base, form.norm)(out_SD) if form.norm else out_SD

    def _product(self, parameter: str, x_SI: Tensor, sizes_E: Tensor, active: list[str]) -> Tensor:
        """Multiply the sorted rows by one stacked parameter, and add the adapters of the projections in it."""
        base, form = self.base_layer, self._form()
        stored = {name: stacked for name, stacked in form.projections.items() if stacked.parameter == parameter}
        transposed = any(stacked.transposed for stacked in stored.values())
        out = grouped_linear(x_SI, form.matrices(base, parameter), sizes_E, transposed=transposed)
        if form.has_bias:
            ids_S = torch.arange(form.num_experts, device=out.device).repeat_interleave(sizes_E, output_size=len(out))
            out = out + getattr(base, f"{parameter}_bias")[ids_S]
        if not any(name in self.factors[adapter] for adapter in active for name in stored):
            return out
        parts = [self._add(out[:, stacked.rows], name, x_SI, sizes_E, active) for name, stacked in stored.items()]
        if len(parts) == 1:
            return parts[0]
        interleaved = any(stacked.rows.step for stacked in stored.values())
        return torch.stack(parts, dim=2).flatten(1) if interleaved else torch.cat(parts, dim=1)

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

    def _form(self) -> ExpertForm:
        """Describe the wrapped module."""
        form = form_of(self.base_layer)
        if form is None:
            raise TypeError(f"{type(self.base_layer).__name__} is no module of stacked experts.")
        return form

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
            weights_EOI = self._form().weights(self.base_layer, name)
            for expert, delta_OI in zip(factors.experts, self.delta(adapter_name, name), strict=True):
                weights_EOI[expert] += sign * delta_OI.to(weights_EOI.dtype)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        """Tell PEFT where this module's adapters belong."""
        weight = self._form().weights(base_layer, "down_proj")
        return weight.device, weight.dtype
