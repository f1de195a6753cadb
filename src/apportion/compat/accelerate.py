"""accelerate's hooks on modules, with which it moves offloaded weights into memory for one call.

Checked on: accelerate 1.15.
When it breaks: `accelerate.hooks.add_hook_to_module` sets the attributes named here. Look there for new names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_HOOK, _FORWARD_UNDER_HOOK = "_hf_hook", "_old_forward"


def hook_of(module: nn.Module) -> Any:
    """Return the hook on a module.

    Args:
        module: Any module.

    Returns:
        The hook, with ``pre_forward`` and ``post_forward``; None if the module has none.
    """
    return vars(module).get(_HOOK)


def offloading_device(module: nn.Module) -> torch.device | None:
    """Return the device that an offloaded module computes on.

    Args:
        module: Any module.

    Returns:
        The device; None if the module's weights are not offloaded.
    """
    hook = hook_of(module)
    return torch.device(hook.execution_device) if getattr(hook, "offload", False) else None


def forward_attribute(module: nn.Module) -> str:
    """Return the name of the attribute that holds a module's own forward.

    Args:
        module: Any module.

    Returns:
        ``forward``, or the attribute where a hook keeps the forward that it wraps.
    """
    return _FORWARD_UNDER_HOOK if _FORWARD_UNDER_HOOK in vars(module) else "forward"
