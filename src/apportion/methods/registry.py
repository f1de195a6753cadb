"""The registry of methods."""

from __future__ import annotations

from apportion.errors import ConfigurationError
from apportion.methods.base import Method
from apportion.methods.controls import COLD, RANDOM
from apportion.methods.gradient import GRADIENT
from apportion.methods.hellora import HELLORA
from apportion.methods.lora import ATTENTION, LORA
from apportion.methods.lora_smoe import LORA_SMOE, RANDOM_VOTES
from apportion.methods.lori import HELLORI, LORI
from apportion.methods.marginal import MARGINAL
from apportion.methods.melora import MELORA
from apportion.methods.mola import MOLA, UNIFORM
from apportion.records.names import suggestion

_ALL = (
    *(HELLORA, LORA, ATTENTION, RANDOM, COLD, GRADIENT, MARGINAL),
    *(LORI, HELLORI, LORA_SMOE, MOLA, UNIFORM, RANDOM_VOTES, MELORA),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def register_method(method: Method) -> Method:
    """Make a method known under its name, to `apportion.plan` and to the command line.

    Args:
        method: The method.

    Returns:
        The same method.

    Raises:
        ValueError: another method has the name.
    """
    if METHODS.setdefault(method.name, method) is not method:
        raise ValueError(f"there is a method {method.name!r} already.")
    return method


def find_method(name: str) -> Method:
    """Return a method by name.

    Args:
        name: A key of `METHODS`.

    Returns:
        The method.

    Raises:
        ConfigurationError: the name is unknown.
    """
    if name in METHODS:
        return METHODS[name]
    raise ConfigurationError(f"there is no method {name!r}.", fix=suggestion(name, METHODS))
