"""transformers' registries of experts functions, the marks of its experts modules, and a renamed training argument.

Checked on: transformers 5.20 to 5.24.
When it breaks: ``transformers/integrations/moe.py`` defines `use_experts_implementation` and the registry, and
``integrations/finegrained_fp8.py`` the registry of FP8 experts. Look there for how a module's forward finds its
function, and for the names of the gating hook. ``modeling_utils.py`` marks modules of expert parallelism.
``training_args.py`` has the name of the argument that turns on checkpointing of activations, which changed in 5.23.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.integrations import finegrained_fp8
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation


def experts_registries() -> list[Any]:
    """List the registries of experts functions.

    Returns:
        The common one, and that of FP8 experts, which not every supported version has.
    """
    fp8 = getattr(finegrained_fp8, "ALL_FP8_EXPERTS_FUNCTIONS", None)
    return [ALL_EXPERTS_FUNCTIONS] if fp8 is None else [ALL_EXPERTS_FUNCTIONS, fp8]


def is_dispatched(experts: nn.Module) -> bool:
    """Return whether transformers calls an experts module through a registry.

    Llama 4's and DBRX's are not.

    Args:
        experts: A module of stacked experts.

    Returns:
        Whether its forward looks its function up in a registry, by a name in its ``config``.
    """
    return hasattr(type(experts).forward, "__wrapped__") and hasattr(experts, "config")


class ConfigWithExperts:
    """A configuration as one experts module sees it: everything is the model's, except the experts function's name.

    Other modules, and other models that share the configuration, keep the function that it names.

    Args:
        config: The model's configuration.
        implementation: Name of the experts function.
    """

    def __init__(self, config: Any, implementation: str) -> None:
        self.config = config
        self._experts_implementation = implementation

    def __getattr__(self, name: str) -> Any:
        """Return the configuration's attribute."""
        if name in ("config", "_experts_implementation") or name.startswith("__"):  # not there yet during a copy
            raise AttributeError(name)
        return getattr(self.config, name)


def run_chosen_experts(registry: Any, experts: Any, config: Any, *args: Tensor) -> Tensor:
    """Run the experts function that a configuration names.

    Args:
        registry: One of `experts_registries`.
        experts: The experts module.
        config: The model's configuration.
        *args: Hidden states, expert ids and routing weights.

    Returns:
        The experts' output.
    """
    function = registry.get_interface(config._experts_implementation, type(experts).forward.__wrapped__)
    output_TD: Tensor = function(experts, *args)
    return output_TD


def is_marked(module: Any) -> bool:
    """Return whether a module carries what transformers' decorator adds to stacked experts."""
    return all(hasattr(module, name) for name in ("_apply_gate", "is_transposed"))


def has_default_gate(module: Any) -> bool:
    """Return whether a marked module's gating is the decorator's: halves of one product, gate first."""
    return bool(type(module)._apply_gate.__module__ == use_experts_implementation.__module__)


def apply_gate(module: Any, gate_up: Tensor) -> Tensor:
    """Apply a marked module's gating to the product of gate and up."""
    gated: Tensor = module._apply_gate(gate_up)
    return gated


def is_expert_parallel(module: nn.Module) -> bool:
    """Return whether a module's experts are split over processes."""
    return bool(getattr(module, "_is_expert_parallel", False))


def activation_checkpointing(*, is_on: bool) -> dict[str, bool]:
    """Return the training argument that computes activations again in the backward pass, under its name here.

    Args:
        is_on: Whether they are computed again.

    Returns:
        The argument by name.
    """
    known = {field.name for field in fields(TrainingArguments)}
    return {"activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing": is_on}
