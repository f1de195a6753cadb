"""LoRA on some experts of a layer whose experts are stacked in one parameter.

The adapter works on activations: the rows routed to planned experts get ``(x Aᵀ) Bᵀ`` added, gate and up with factors
of their own. The merged weight is never built, and no gradient of a frozen weight is ever formed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apportion.adapters.constants import constant
from apportion.adapters.factors import ExpertFactors, FrozenFactor, SparseFactor, matrix_of
from apportion.adapters.fused import fused_experts
from apportion.adapters.mixed import assemble_rows, rows_by_name, select_rows
from apportion.adapters.one_token import run_one_token
from apportion.adapters.routed_rows import LowRankTerm, RoutedExperts, joined
from apportion.adapters.wrapped import WrappedModule
from apportion.experts.dispatch import enter, is_dispatched
from apportion.experts.forms import known_form
from apportion.experts.grouped import grouped_low_rank, inverse_order, reorder_rows
from apportion.experts.run import base_product, expert_of_rows, run_experts

# Shapes: T tokens, K experts a token, S = T·K routed rows sorted by expert, E experts, D model width, F expert width,
# I and O a projection's input and output width, R summed rank of the planned experts.

_RANK_BLOCK = 8  # PyTorch's grouped product wants ranks that are multiples of it
_FEW_ROWS = 128  # up to here, rounding and joining factors costs more than it saves


def _low_rank(term: LowRankTerm, x_SI: Tensor, ends_E: Tensor) -> Tensor:
    """Give what a term adds to sorted rows; nothing here waits for a GPU.

    The rows of the planned experts come first, in their order, and the products stop behind them.
    """
    factors, b_RO = term.planned, matrix_of(term.b_RO).to(x_SI.dtype)
    a_HRI = factors.padded(term.a_RI * factors.scale(term.a_RI), _RANK_BLOCK)
    b_HRO = factors.padded(b_RO, _RANK_BLOCK)
    if len(factors.experts) == len(ends_E):
        return grouped_low_rank(x_SI, a_HRI, b_HRO, ends_E)
    planned_H = constant(factors.experts, x_SI.device)
    is_planned_E = torch.zeros_like(ends_E, dtype=torch.bool).index_fill(0, planned_H, value=True)
    unplanned_S = ~is_planned_E[expert_of_rows(x_SI, ends_E)]
    order_S = unplanned_S.to(torch.uint8).sort(stable=True).indices
    place_S = inverse_order(order_S)
    ends_H = ends_E.diff(prepend=ends_E.new_zeros(1))[planned_H].cumsum(0).to(torch.int32)
    behind_S1 = (torch.arange(len(order_S), device=order_S.device) >= ends_H[-1]).unsqueeze(1)
    first_SI = reorder_rows(x_SI, order_S, place_S).masked_fill(behind_S1, 0)
    delta_SO = grouped_low_rank(first_SI, a_HRI, b_HRO, ends_H).masked_fill(behind_S1, 0)
    return reorder_rows(delta_SO, place_S, order_S)


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
        self.form = known_form(base_layer)
        self.is_dispatched = is_dispatched(base_layer)
        if self.is_dispatched:
            enter(base_layer)
        self.lora_dropout = nn.ModuleDict()
        self.factors: dict[str, dict[str, ExpertFactors]] = {}

    def add_adapter(
        self,
        adapter_name: str,
        factors: Mapping[str, ExpertFactors],
        dropout: float = 0.0,
        *,
        frozen_a: bool = False,
        stored_a: bool = False,
    ) -> None:
        """Add zero-initialised factors under a new name.

        Args:
            adapter_name: The adapter's name.
            factors: What is planned, by projection (``gate_proj``, ``up_proj``, ``down_proj``).
            dropout: Share of the adapter's inputs that is dropped in training.
            frozen_a: Whether A stays as it is drawn.
            stored_a: Whether checkpoints hold a frozen A.
        """
        a: dict[str, Any] = {}
        b: dict[str, Any] = {}
        for name, planned in factors.items():
            weights_EOI = self.form.weights(self.base_layer, name)
            (_, width_out, width_in), rank = weights_EOI.shape, sum(planned.ranks)
            kwargs: dict[str, Any] = {"device": weights_EOI.device, "dtype": weights_EOI.dtype}
            a[name] = nn.Parameter(torch.empty(rank, width_in, **kwargs))
            b[name] = nn.Parameter(torch.zeros(rank, width_out, **kwargs))
            if frozen_a:
                a[name] = FrozenFactor(rank, width_in, weights_EOI.device, stored=stored_a)
            if planned.indices is not None:
                b[name] = SparseFactor(rank, width_out, planned.stacked_indices(width_out), weights_EOI.device)
            nn.init.kaiming_uniform_(matrix_of(a[name]), a=math.sqrt(5))
        self.factors[adapter_name] = dict(factors)
        for side, made in ((self.lora_A, a), (self.lora_B, b)):
            whole = all(isinstance(factor, nn.Parameter) for factor in made.values())
            side[adapter_name] = nn.ParameterDict(made) if whole else nn.ModuleDict(made)
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()

    def keep(self, adapter_name: str, name: str, indices: Sequence[Tensor]) -> None:
        """Keep other entries of a sparse B, all of them zero.

        Args:
            adapter_name: The adapter.
            name: The projection.
            indices: Each planned expert's kept entries, laid out row by row (out, rank).
        """
        factors = replace(self.factors[adapter_name][name], indices=tuple(indices))
        self.factors[adapter_name][name] = factors
        sparse = self.lora_B[adapter_name][name]
        sparse.keep(factors.stacked_indices(sparse.shape[1]))

    def run(
        self,
        active: Sequence[str],
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """Run the experts with the named adapters.

        Args:
            active: Adapters that this module has.
            hidden_states: Shape (T, D); or (E·T, D), one copy of the tokens an expert, where the module is called so.
            top_k_index: Expert ids, shape (T, K).
            top_k_weights: Routing weights, shape (T, K).

        Returns:
            The shape of `hidden_states`.
        """
        routing = () if top_k_index is None else (top_k_index, top_k_weights)
        run_rows = partial(self._run_rows, active)
        output: Tensor
        if not active:
            output = self.base_layer(hidden_states, *routing)
        elif self.is_dispatched:
            output = self.base_layer(hidden_states, *routing, run_rows=run_rows)
        else:
            output = run_rows(hidden_states, *routing)
        return output

    def _run_rows(
        self,
        active: Sequence[str],
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """Run the experts and the adapters on the base module's weights as they are now: inside its own forward."""
        form = self.form
        composed = not hidden_states.is_cpu or torch.compiler.is_compiling() or len(active) > 1 or form.norm
        if composed or top_k_index is None or top_k_weights is None:
            return run_experts(
                self.base_layer, hidden_states, top_k_index, top_k_weights, partial(self.adapted_product, active)
            )
        dtype = form.weights(self.base_layer, "down_proj").dtype
        terms: dict[str, Sequence[LowRankTerm]] = {
            parameter: list(self._terms(active[0], parameter).values()) for parameter in form.parameters
        }
        if torch.is_grad_enabled() or top_k_index.numel() > _FEW_ROWS:
            terms = {parameter: joined([term.to(dtype) for term in own]) for parameter, own in terms.items()}
        dropout = self.lora_dropout[active[0]]
        routed = RoutedExperts(
            module=self.base_layer,
            form=form,
            ids_TK=top_k_index,
            terms=terms,
            dropout=dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0,
        )
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        plain = len(hidden_TD) == 1 and not routed.dropout and not torch.is_grad_enabled()
        run = run_one_token if plain else fused_experts
        autocast = torch.is_autocast_enabled("cpu")  # the backward pass has none either
        with torch.autocast("cpu", enabled=False) if autocast else contextlib.nullcontext():
            out_TD = run(routed, hidden_TD.to(dtype), top_k_weights)
        return out_TD.to(hidden_states.dtype).view_as(hidden_states)

    def _run_mixed(self, adapter_names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run each adapter on the rows that name it; a module that is called with copies has them expert by expert."""
        if self.form.called == "routed":
            mixed: Tensor = super()._run_mixed(adapter_names, args, kwargs)
            return mixed
        hidden_TED = args[0].view(self.form.num_experts, -1, args[0].shape[-1]).transpose(0, 1)
        parts = []
        for name, rows in rows_by_name(adapter_names):
            selected = select_rows(hidden_TED, rows, len(adapter_names)).transpose(0, 1)
            out = self.run([name] if name in self.lora_A else [], selected.flatten(0, 1))
            parts.append((rows, out.view_as(selected).transpose(0, 1)))
        out_TED: Tensor = assemble_rows(parts)
        return out_TED.transpose(0, 1).reshape_as(args[0])

    def _terms(self, adapter: str, parameter: str) -> dict[str, LowRankTerm]:
        """Give what an adapter adds to the product of one stacked parameter, by projection."""
        terms = {}
        for name, stacked in self.form.projections_in(parameter).items():
            planned = self.factors[adapter].get(name)
            if planned is not None:
                a_RI, b_RO = matrix_of(self.lora_A[adapter][name]), self.lora_B[adapter][name]
                terms[name] = LowRankTerm(a_RI, b_RO, planned, stacked.rows)
        return terms

    def adapted_product(self, active: Sequence[str], parameter: str, x_SI: Tensor, ends_E: Tensor) -> Tensor:
        """Multiply sorted rows by one stacked base parameter and add adapters; `run_experts` calls this.

        Args:
            active: Adapters that this module has.
            parameter: The parameter's path in the experts module.
            x_SI: Its input, rows sorted by expert.
            ends_E: Where each expert's rows end, int32.

        Returns:
            Shape (S, O).
        """
        out_SO = base_product(self.base_layer, parameter, x_SI, ends_E)
        return self.after_product(active, parameter, x_SI, out_SO, ends_E)

    def after_product(
        self, active: Sequence[str], parameter: str, x_SI: Tensor, out_SO: Tensor, ends_E: Tensor
    ) -> Tensor:
        """Add adapters to the output of one stacked base parameter.

        Args:
            active: Adapters that this module has.
            parameter: The parameter's path in the experts module.
            x_SI: Its input, rows sorted by expert.
            out_SO: Its output.
            ends_E: Where each expert's rows end, int32.

        Returns:
            Shape (S, O).
        """
        for adapter in active:
            named = self._terms(adapter, parameter)
            if not named:
                continue
            x = self.lora_dropout[adapter](x_SI)
            terms = joined([term.to(x_SI.dtype) for term in named.values()])
            if len(terms) < len(named):
                out_SO = out_SO + _low_rank(terms[0], x, ends_E).to(out_SO.dtype)
                continue
            parts = self.form.split(parameter, out_SO)
            for name, term in zip(named, terms, strict=True):
                parts[name] = parts[name] + _low_rank(term, x, ends_E).to(out_SO.dtype)
            out_SO = self.form.join(parameter, parts)
        return out_SO

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
        a_RI, b_RO = matrix_of(self.lora_A[adapter_name][name]), matrix_of(self.lora_B[adapter_name][name])
        parts = zip(factors.by_expert(a_RI).values(), factors.by_expert(b_RO).values(), factors.scales, strict=True)
        return torch.stack([(b.t() @ a) * scale for a, b, scale in parts])

    def merged_parameters(self) -> tuple[str, ...]:
        """Name the stacked parameters that merging adds to."""
        return self.form.parameters

    def is_finite(self, adapter_name: str) -> bool:
        """Tell whether all that an adapter would add to the weights is finite."""
        return all(bool(torch.isfinite(self.delta(adapter_name, name)).all()) for name in self.factors[adapter_name])

    @torch.no_grad()
    def add_to_weights(self, adapter_name: str, sign: float) -> None:
        """Add an adapter's deltas, times the sign, to the stacked weights."""
        for name, factors in self.factors[adapter_name].items():
            weights_EOI = self.form.weights(self.base_layer, name)
            for expert, delta_OI in zip(factors.experts, self.delta(adapter_name, name), strict=True):
                weights_EOI[expert] += sign * delta_OI.to(weights_EOI.dtype)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        """Tell PEFT where this module's adapters belong."""
        weight = known_form(base_layer).weights(base_layer, "down_proj")
        return weight.device, weight.dtype
