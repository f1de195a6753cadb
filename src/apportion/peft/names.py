"""Names of adapters that PEFT would mistake for parts of the names of other adapters' tensors."""

from __future__ import annotations

import re

from torch import nn

from apportion.discovery import walk_modules
from apportion.errors import ConfigurationError

# Parts of the names of our own tensors, whatever the model is.
_OWN_PARTS = re.compile(
    r"lora_(shape|[A-Z]|router|dropout)|low_rank|sparse|shape|weight|base_layer|[a-z_]+_proj(_[0-9]+)?"
)


def check_told_apart(model: nn.Module, adapter_name: str) -> None:
    """Raise an error if PEFT could not tell the tensors of the model's adapters and of a new one apart.

    PEFT tells them apart by the parts of their names between dots. If an adapter has the name of a module, PEFT leaves
    tensors of the other adapters out of their files.

    Args:
        model: The model with its present adapters. With none, every name works.
        adapter_name: Name of the new adapter.

    Raises:
        ConfigurationError: there are other adapters, and a name is part of the names of tensors.
    """
    others = list(getattr(model, "peft_config", {}))
    if not others:
        return
    parts = {part for path, _, _ in walk_modules(model) for part in path.split(".")}
    for name in (adapter_name, *others):
        if name in parts or _OWN_PARTS.fullmatch(name):
            raise ConfigurationError(
                f"a model with several adapters cannot have one called {name!r}: modules have this name, and PEFT "
                "would leave tensors of the other adapters out of their files.",
                fix="choose names that no module has",
            )
