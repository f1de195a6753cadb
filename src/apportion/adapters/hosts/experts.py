"""Any shape of adapter on some experts of a layer whose experts are stacked in one parameter.

The adapter works on activations: the rows routed to planned experts get ``(x Aᵀ) Bᵀ`` added, with the LoRA that equals
the shape, and gate and up with shapes of their own. The merged weight is never built, and no gradient of a frozen
weight is ever formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apportion.adapters.hosts.wrapped import WrappedModule
from apportion.adapters.kernels.composed import add_terms
from apportion.adapters.kernels.cpu.matrices import FrozenMatrices
from apportion.adapters.kernels.cpu.routed import RoutedExperts
from apportion.adapters.kernels.cpu.run import run_on_cpu
from apportion.adapters.kernels.terms import LowRankTerm
from apportion.adapters.mixed import assemble_rows, rows_by_name, select_rows
from apportion.adapters.shapes.base import Place
from apportion.compat.transformers import is_dispatched
from apportion.experts.dispatch import enter
from apportion.experts.forms import known_form
from apportion.experts.run import base_product, run_experts

# Shapes: T tokens, K experts per token, S = T·K routed rows sorted by expert, E experts, N rows of the batch that use
# one adapter, D model width, I and O a projection's input and output width, R summed rank of the planned experts.


class ExpertLora(WrappedModule):
    """A module of stacked experts, with adapters on the planned experts' projections.

    Args:
        base_layer: A module that `form_of` knows.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.form = known_form(base_layer)
        self.is_dispatched = is_dispatched(base_layer)
        if self.is_dispatched:
            enter(base_layer)

    def places(self) -> dict[str, Place]:
        """Return one expert's matrix of each projection, which adapters are made for."""
        places = {}
        for name in self.form.projections:
            stored = self.form.stored(self.base_layer, name)
            _, width_out, width_in = self.form.shape(self.base_layer, name)
            places[name] = Place(width_out, width_in, stored.device, stored.dtype)
        return places

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
            hidden_states: Shape (T, D); or (E·T, D), one copy of the tokens per expert, where the module is called so.
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
        else:  # the direct path that `apportion.experts.dispatch` describes
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
        is_composed = (
            not hidden_states.is_cpu or torch.compiler.is_compiling() or len(active) > 1 or self.form.norm is not None
        )
        if is_composed or top_k_index is None or top_k_weights is None:
            return run_experts(
                self.base_layer, hidden_states, top_k_index, top_k_weights, partial(self.adapted_product, active)
            )
        base, form, dropout = self.base_layer, self.form, self.lora_dropout[active[0]]
        matrices = {name: FrozenMatrices.of(*form.matrices(base, name)) for name in form.parameters}
        routed = RoutedExperts(
            module=base,
            form=form,
            matrices=matrices,
            ids_TK=top_k_index,
            terms={name: list(self._terms(active[0], name).values()) for name in matrices},
            dropout=dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0,
        )
        return run_on_cpu(routed, hidden_states, top_k_weights)

    def _run_mixed(self, adapter_names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run each adapter on the rows that name it; a module that is called with copies has them expert by expert."""
        if self.form.called == "routed":
            out_TD: Tensor = super()._run_mixed(adapter_names, args, kwargs)
            return out_TD
        hidden_TED = args[0].view(self.form.num_experts, -1, args[0].shape[-1]).transpose(0, 1)
        parts = []
        for name, rows_N in rows_by_name(adapter_names):
            selected_ETD = select_rows(hidden_TED, rows_N, len(adapter_names)).transpose(0, 1)
            out_ND = self.run([name] if name in self.lora_shape else [], selected_ETD.flatten(0, 1))
            parts.append((rows_N, out_ND.view_as(selected_ETD).transpose(0, 1)))
        out_TED: Tensor = assemble_rows(parts)
        return out_TED.transpose(0, 1).reshape_as(args[0])

    def _terms(self, adapter: str, parameter: str) -> dict[str, LowRankTerm]:
        """Return what an adapter adds to the product of one stacked parameter, by projection."""
        shapes = self.lora_shape[adapter]
        projections = self.form.projections_in(parameter).items()
        return {name: term for name, stacked in projections if (term := shapes.term(name, stacked.rows)) is not None}

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
        out_SO = base_product(self.base_layer, self.form, parameter, x_SI, ends_E)
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
            terms = self._terms(adapter, parameter)
            if terms:
                out_SO = add_terms(self.form, parameter, terms, self.lora_dropout[adapter](x_SI), out_SO, ends_E)
        return out_SO

    def merged_parameters(self) -> tuple[str, ...]:
        """Name the stacked parameters that merging adds to."""
        return self.form.parameters

    def weight_deltas(self, adapter_name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the planned experts' matrices and what an adapter adds to them."""
        for name in self.form.projections:
            weights_EOI = self.form.weights(self.base_layer, name)
            for expert, delta_OI in self.lora_shape[adapter_name].weight_deltas(name):
                yield weights_EOI[expert], delta_OI

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        """Return the device and type of this module's adapters, for PEFT."""
        weight = known_form(base_layer).stored(base_layer, "down_proj")
        return weight.device, weight.dtype
