"""Run rows inside a stacked experts module's own forward, through transformers' registries of experts functions.

Whatever hangs on the call of that module then works with adapters: FSDP units, hooks, offloading.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.integrations import finegrained_fp8
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

# Shapes: T tokens, K experts per token, D model width.

NAME = "apportion"

RunRows = Callable[[Tensor, Tensor, Tensor], Tensor]


class _ConfigWithDispatch:
    """A configuration as one experts module sees it: everything is the model's, but the name of the experts function.

    Other modules, and other models that share the configuration, keep the function that it names.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    _experts_implementation = NAME

    def __getattr__(self, name: str) -> Any:
        """Return the configuration's attribute."""
        if name == "config" or name.startswith("__"):  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self.config, name)


def is_dispatched(experts: nn.Module) -> bool:
    """Tell whether transformers calls an experts module through one of its registries.

    Experts of families outside the registries have a direct path: adapted rows run beside the module's own forward,
    which is not called, so hooks on the module do not run and it cannot be an FSDP unit of its own. These are Llama 4's
    and DBRX's. Experts in module lists are no stacked experts: each linear layer has an adapter of its own and is
    called as before.

    Args:
        experts: A module of stacked experts.

    Returns:
        Whether `enter` works on it.
    """
    return hasattr(type(experts).forward, "__wrapped__") and hasattr(experts, "config")


def enter(experts: Any) -> None:
    """Have an experts module run the function that is passed with a call, where one is passed."""
    if not isinstance(experts.config, _ConfigWithDispatch):
        experts.config = _ConfigWithDispatch(experts.config)


def leave(experts: Any) -> None:
    """Undo `enter`."""
    config = getattr(experts, "config", None)
    if isinstance(config, _ConfigWithDispatch):
        experts.config = config.config


def _registries() -> list[Any]:
    """List transformers' registries of experts functions.

    FP8 experts look their function up in one of their own, which not every supported version has.
    """
    fp8 = getattr(finegrained_fp8, "ALL_FP8_EXPERTS_FUNCTIONS", None)
    return [ALL_EXPERTS_FUNCTIONS] if fp8 is None else [ALL_EXPERTS_FUNCTIONS, fp8]


def _run(
    registry: Any,
    experts: Any,
    hidden_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    run_rows: RunRows | None = None,
) -> Tensor:
    """Run what was passed with the call; without it, the experts function of the model's configuration."""
    if run_rows is not None:
        return run_rows(hidden_TD, ids_TK, weights_TK)
    chosen = experts.config.config._experts_implementation
    function = registry.get_interface(chosen, type(experts).forward.__wrapped__)
    output_TD: Tensor = function(experts, hidden_TD, ids_TK, weights_TK)
    return output_TD


for _registry in _registries():
    _registry.register(NAME, partial(_run, _registry))
