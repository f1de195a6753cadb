"""Run rows inside a stacked experts module's own forward, through transformers' registries of experts functions.

Whatever hangs on the call of that module then works with adapters: FSDP units, hooks, offloading.

Experts of families outside the registries (Llama 4, DBRX) have a direct path: adapted rows run beside the module's own
forward, which is not called, so hooks on the module do not run and it cannot be an FSDP unit of its own. Experts in
module lists are no stacked experts: each linear layer has an adapter of its own and is called as before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from apportion.compat.transformers import ConfigWithExperts, experts_registries, run_chosen_experts

# Shapes: T tokens, K experts per token, D model width.

NAME = "apportion"

RunRows = Callable[[Tensor, Tensor, Tensor], Tensor]


def enter(experts: Any) -> None:
    """Have an experts module run the function that is passed with a call, where one is passed.

    Args:
        experts: A module for which `apportion.compat.transformers.is_dispatched` holds.
    """
    if not isinstance(experts.config, ConfigWithExperts):
        experts.config = ConfigWithExperts(experts.config, NAME)


def leave(experts: Any) -> None:
    """Undo `enter`."""
    config = getattr(experts, "config", None)
    if isinstance(config, ConfigWithExperts):
        experts.config = config.config


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
    return run_chosen_experts(registry, experts, experts.config.config, hidden_TD, ids_TK, weights_TK)


for _registry in experts_registries():
    _registry.register(NAME, partial(_run, _registry))
