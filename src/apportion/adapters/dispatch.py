"""Run rows inside a stacked experts module's own forward, through transformers' registry of experts functions.

Whatever hangs on the call of that module then works with adapters: FSDP units, hooks, offloading.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "apportion"

RunRows = Callable[[Tensor, Tensor, Tensor], Tensor]


class _ConfigWithDispatch:
    """A configuration as one experts module sees it: everything is the model's, but the name of the experts function.

    Args:
        config: The model's configuration, which other modules and models share.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    _experts_implementation = NAME

    def __getattr__(self, name: str) -> Any:
        """Give the configuration's attribute."""
        if name == "config" or name.startswith("__"):  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self.config, name)


def is_dispatched(experts: nn.Module) -> bool:
    """Tell whether transformers calls an experts module through its registry.

    Llama 4's and DBRX's experts are not.

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


def _run(
    experts: Any, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, run_rows: RunRows | None = None
) -> Tensor:
    """Run what was passed with the call; without it, the experts function of the model's configuration."""
    if run_rows is not None:
        return run_rows(hidden_TD, ids_TK, weights_TK)
    chosen = experts.config.config._experts_implementation
    function = ALL_EXPERTS_FUNCTIONS.get_interface(chosen, type(experts).forward.__wrapped__)
    output: Tensor = function(experts, hidden_TD, ids_TK, weights_TK)
    return output


ALL_EXPERTS_FUNCTIONS.register(NAME, _run)
