"""The forms in which models stack the experts of a layer: where each projection lives, and how the module is called.

Modules that transformers marks with `use_experts_implementation` describe themselves. A family that it does not mark
is one more function here, and everything else (sites, counting, adapters, merging) follows from the form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from apportion.compat.transformers import apply_gate, has_default_gate, is_marked
from apportion.experts.weights import StackedWeight, stacked_weight

# Shapes: S routed rows sorted by expert, E experts, O a parameter's output width, P the shape of a parameter as it is
# stored: (E, out, in), (E, in, out), or either of them with the experts' rows one under the other.


@dataclass(frozen=True)
class Stacked:
    """Where one projection of every expert lives.

    Args:
        parameter: Path of the parameter in the experts module; it has the experts first, or its rows are the experts'
            rows one under the other.
        transposed: Whether each expert's matrix is stored as (in, out).
        rows: The projection's part of the output axis, where several projections share the parameter.
    """

    parameter: str
    transposed: bool = False
    rows: slice = field(default_factory=lambda: slice(None))


@dataclass(frozen=True)
class ExpertForm:
    """How one experts module stores and calls its experts.

    Args:
        num_experts: Experts in the module.
        projections: Where each projection lives, by the last part of its site names; ``down_proj`` is the last.
        activate: What stands between the entering projections and ``down_proj``: from the module and the products of
            the entering parameters to the input of ``down_proj``.
        called: ``routed`` with the tokens, their experts' ids and weights; ``stacked`` with one copy of all tokens per
            expert, one copy after the other, each token already multiplied by its weight, which is zero where it is
            not routed there.
        has_bias: Whether every parameter has a bias, under its name with ``_bias``.
        norm: Name of a module that runs after each expert.
        is_swiglu: Whether `activate` is the SiLU of a product's first half times the second half, and nothing else.
    """

    num_experts: int
    projections: Mapping[str, Stacked]
    activate: Callable[[Any, Mapping[str, Tensor]], Tensor]
    called: Literal["routed", "stacked"] = "routed"
    has_bias: bool = False
    norm: str | None = None
    is_swiglu: bool = False

    @property
    def entering(self) -> tuple[str, ...]:
        """The parameters that the tokens enter by."""
        names = (stacked.parameter for name, stacked in self.projections.items() if name != "down_proj")
        return tuple(dict.fromkeys(names))

    @property
    def parameters(self) -> tuple[str, ...]:
        """All stacked parameters, in the order in which they are multiplied by."""
        return (*self.entering, self.projections["down_proj"].parameter)

    def projections_in(self, parameter: str) -> dict[str, Stacked]:
        """Return the projections that a parameter holds, in its order."""
        return {name: stacked for name, stacked in self.projections.items() if stacked.parameter == parameter}

    def split(self, parameter: str, out_SO: Tensor) -> dict[str, Tensor]:
        """Split a parameter's output, or its gradient, into its projections'.

        Args:
            parameter: The parameter's path.
            out_SO: Shape (S, O).

        Returns:
            Views by projection; `join` puts them together again.
        """
        return {name: out_SO[:, stacked.rows] for name, stacked in self.projections_in(parameter).items()}

    def join(self, parameter: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Put the outputs of a parameter's projections together.

        Args:
            parameter: The parameter's path.
            parts: Outputs by projection, as `split` gives them.

        Returns:
            Shape (S, O).
        """
        tensors = list(parts.values())
        if len(tensors) == 1:
            return tensors[0]
        interleaved = any(stacked.rows.step for stacked in self.projections_in(parameter).values())
        return torch.stack(tensors, dim=2).flatten(1) if interleaved else torch.cat(tensors, dim=1)

    def matrices(self, module: nn.Module, parameter: str) -> tuple[StackedWeight, bool]:
        """Return a parameter's matrices as they are stored; nothing is dequantised.

        Args:
            module: The experts module.
            parameter: The parameter's path.

        Returns:
            The matrices; whether they are (experts, in, out) and not (experts, out, in).
        """
        places = self.projections.values()
        transposed = any([place.transposed for place in places if place.parameter == parameter])  # noqa: C419 - quicker
        return stacked_weight(module, parameter), transposed

    def stored(self, module: nn.Module, projection: str) -> StackedWeight:
        """Return the matrices of the parameter that holds a projection.

        Args:
            module: The experts module.
            projection: The projection.

        Returns:
            The matrices; nothing is dequantised.
        """
        return stacked_weight(module, self.projections[projection].parameter)

    def shape(self, module: nn.Module, projection: str) -> tuple[int, int, int]:
        """Return the shape of one projection of every expert; no value is read.

        Args:
            module: The experts module.
            projection: The projection.

        Returns:
            (experts, out, in).
        """
        stacked = self.projections[projection]
        num_experts, rows, columns = self.stored(module, projection).shape
        width_out, width_in = (columns, rows) if stacked.transposed else (rows, columns)
        return num_experts, len(range(width_out)[stacked.rows]), width_in

    def weights(self, module: nn.Module, projection: str) -> Tensor:
        """Return one projection of every expert, to write to.

        Args:
            module: The experts module, its parameters plain.
            projection: The projection.

        Returns:
            A view of shape (experts, out, in).
        """
        return self.view(attrgetter(self.projections[projection].parameter)(module), projection)

    def bias(self, module: nn.Module, parameter: str) -> Tensor | None:
        """Return a parameter's bias.

        Args:
            module: The experts module.
            parameter: The parameter's path.

        Returns:
            Shape (experts, out); None where the experts have none.
        """
        return getattr(module, f"{parameter}_bias") if self.has_bias else None

    def view(self, stored_P: Tensor, projection: str) -> Tensor:
        """Return one projection of every expert in a tensor of its parameter's shape, such as the gradient.

        Args:
            stored_P: The parameter, or a tensor of its shape.
            projection: The projection.

        Returns:
            A view of shape (experts, out, in).
        """
        stacked = self.projections[projection]
        matrices = self._experts_first(stored_P)
        return (matrices.transpose(1, 2) if stacked.transposed else matrices)[:, stacked.rows]

    def _experts_first(self, stored_P: Tensor) -> Tensor:
        """Add the experts' axis to a tensor whose rows are the experts' rows one under the other."""
        return stored_P if stored_P.ndim == 3 else stored_P.view(self.num_experts, -1, stored_P.shape[-1])


def form_of(module: Any) -> ExpertForm | None:
    """Recognise an experts module.

    Args:
        module: Any module.

    Returns:
        Its form, or None where it is no module of stacked experts, or of a form that is not supported.

    Raises:
        ConfigurationError: its weights are stored in a form that cannot be read.
    """
    for recognise in _RECOGNISERS:
        form = recognise(module)
        if form is not None:
            return form
    return None


def register_form(recognise: Callable[[Any], ExpertForm | None]) -> None:
    """Support one more family of experts modules.

    Args:
        recognise: Returns the form of a module, or None for modules of other families.
    """
    _RECOGNISERS.append(recognise)


def known_form(module: Any) -> ExpertForm:
    """Return the form of a module that has one.

    Args:
        module: A module of stacked experts.

    Returns:
        Its form.

    Raises:
        TypeError: it has none.
    """
    form = form_of(module)
    if form is None:
        raise TypeError(f"{type(module).__name__} is no module of stacked experts.")
    return form


def _marked(module: Any) -> ExpertForm | None:
    """Read what transformers' decorator says about a module."""
    if not is_marked(module):
        return None
    transposed = module.is_transposed
    down = Stacked("down_proj", transposed)
    if module.has_gate:
        width = stacked_weight(module, "gate_up_proj").shape[2 if transposed else 1] // 2
        halves = (slice(0, width), slice(width, None)) if module.is_concatenated else _interleaved()
        entering = {
            name: Stacked("gate_up_proj", transposed, rows)
            for name, rows in zip(("gate_proj", "up_proj"), halves, strict=True)
        }
        activate = _own_gate
    else:
        entering, activate = {"up_proj": Stacked("up_proj", transposed)}, _no_gate
    return ExpertForm(
        num_experts=stacked_weight(module, "down_proj").shape[0],
        projections={**entering, "down_proj": down},
        activate=activate,
        has_bias=module.has_bias,
        norm="post_expert_norm" if module.has_post_expert_norm else None,
        is_swiglu=module.has_gate and has_default_gate(module) and isinstance(module.act_fn, nn.SiLU | SiLUActivation),
    )


def _every_expert_at_once(module: Any) -> ExpertForm | None:
    """Recognise Llama 4: a batched product over all experts, gate and up in one transposed parameter."""
    if type(module).__name__ != "Llama4TextExperts":
        return None
    num_experts, _, both_widths = stacked_weight(module, "gate_up_proj").shape
    width = both_widths // 2
    return ExpertForm(
        num_experts=num_experts,
        projections={
            "gate_proj": Stacked("gate_up_proj", transposed=True, rows=slice(0, width)),
            "up_proj": Stacked("gate_up_proj", transposed=True, rows=slice(width, None)),
            "down_proj": Stacked("down_proj", transposed=True),
        },
        activate=_swiglu_of_halves,
        called="stacked",
    )


def _rows_of_all_experts(module: Any) -> ExpertForm | None:
    """Recognise DBRX: the experts' rows one under the other, gate and up apart.

    Its ``w1``, ``v1`` and ``w2`` go by the names that every reader of per-expert adapters knows.
    """
    if type(module).__name__ != "DbrxExperts":
        return None
    return ExpertForm(
        num_experts=int(module.num_experts),
        projections={
            "gate_proj": Stacked("mlp.w1"),
            "up_proj": Stacked("mlp.v1"),
            "down_proj": Stacked("mlp.w2", transposed=True),
        },
        activate=_swiglu_of_dbrx,
    )


def _interleaved() -> tuple[slice, slice]:
    """Return the rows of gate and up where they alternate."""
    return slice(0, None, 2), slice(1, None, 2)


def _own_gate(module: Any, entered: Mapping[str, Tensor]) -> Tensor:
    """Call the gating of a marked module."""
    return apply_gate(module, entered["gate_up_proj"])


def _no_gate(module: Any, entered: Mapping[str, Tensor]) -> Tensor:
    """Call the activation of a module without a gate."""
    activated: Tensor = module.act_fn(entered["up_proj"])
    return activated


def _swiglu_of_halves(module: Any, entered: Mapping[str, Tensor]) -> Tensor:
    """Gate one half of the product with the other."""
    gate, up = entered["gate_up_proj"].chunk(2, dim=-1)
    gated: Tensor = up * module.act_fn(gate)
    return gated


def _swiglu_of_dbrx(module: Any, entered: Mapping[str, Tensor]) -> Tensor:
    """Gate one product with the other."""
    gated: Tensor = module.mlp.activation_fn(entered["mlp.w1"]) * entered["mlp.v1"]
    return gated


_RECOGNISERS: list[Callable[[Any], ExpertForm | None]] = [_marked, _every_expert_at_once, _rows_of_all_experts]
