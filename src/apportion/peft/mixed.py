"""`adapter_names=`: batches in which every row uses its own adapter, as in PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from apportion.adapters.hosts.wrapped import WrappedModule
from apportion.errors import ConfigurationError
from apportion.peft.hosted import adapters_of

BASE = "__base__"  # PEFT's name for a row without an adapter


@contextmanager
def adapter_per_row(tuner: Any, adapter_names: Sequence[str], num_beams: int) -> Iterator[None]:
    """Make every adapted layer use one adapter per row inside the context.

    Args:
        tuner: The model with adapters.
        adapter_names: One name per row of the batch, ``__base__`` for no adapter.
        num_beams: Number of beams; each row is repeated that often.

    Yields:
        Nothing.

    Raises:
        ConfigurationError: a name is unknown, the model is in training mode, the batch has another number of rows, or
            an adapted layer receives tokens without the rows that they belong to.
    """
    if tuner.training:
        raise ConfigurationError(
            "adapter_names cannot be used in training.", fix="call eval() first, or leave out adapter_names"
        )
    used = set(adapter_names) - {BASE}
    unknown = sorted(used - set(tuner.peft_config))
    if unknown:
        raise ConfigurationError(
            f"there is no adapter {unknown[0]!r}.",
            found=", ".join(tuner.peft_config),
            fix="name one of these per row, or __base__ for none",
        )
    for name in used:
        for site in tuner.bound[name].routed_linear_sites:
            raise ConfigurationError(
                f"adapter {name!r} cannot be used per row: one of its layers receives tokens without their rows.",
                place=site,
                fix="run the rows of each adapter as a separate batch, with set_adapter",
            )
    names = [name for name in adapter_names for _ in range(num_beams)]
    with ExitStack() as stack:
        handle = tuner.model.register_forward_pre_hook(partial(_check_rows, len(names)), with_kwargs=True)
        stack.callback(handle.remove)
        for module in tuner.modules():
            if isinstance(module, (LoraLayer, WrappedModule)):
                layer_names = names if used & adapters_of(module) else [BASE] * len(names)
                handle = module.register_forward_pre_hook(partial(_name_rows, layer_names), with_kwargs=True)
                stack.callback(handle.remove)
        yield


def _check_rows(num_names: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise an error if the batch does not have one row per name."""
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    inputs = next((value for value in given if value is not None), None)
    if inputs is not None and len(inputs) != num_names:
        raise ConfigurationError(
            f"adapter_names has {num_names} names, but the batch has {len(inputs)} rows.", fix="give one name per row"
        )


def _name_rows(
    names: Sequence[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the names to a layer. PEFT's own layers expect one per entry of their input, which may be a token."""
    if isinstance(module, LoraLayer) and set(names) == {BASE}:
        names = [BASE] * len(args[0])
    elif isinstance(module, LoraLayer) and args[0].ndim == 2 and len(args[0]) % len(names) == 0:
        names = [name for name in names for _ in range(len(args[0]) // len(names))]
    return args, {**kwargs, "adapter_names": list(names)}
