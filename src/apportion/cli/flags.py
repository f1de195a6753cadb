"""Flags that commands make from option models: one flag per option, whatever the number of models that have it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from apportion.records.options import OptionFlag, Options

_FEW = 3  # owners of a default that are named one by one


def option_flags(models: Mapping[str, type[Options]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's ``**options`` by the flags of option models.

    The command is called with the options that were given, as the models take them, and with no others: a flag that
    was given with its default's value counts as given. Which model has which option is for the work to check.

    Args:
        models: Option models by the name of what they belong to, for help where models differ.

    Returns:
        A decorator for Typer commands that end in ``**options``.
    """
    flags = _united({owner: model.flags() for owner, model in models.items()})
    panel = next(iter(models.values())).panel

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters = [*own, *(_parameter(name, uses, len(models), panel) for name, uses in flags.items())]

        @functools.wraps(command)
        def with_options(**arguments: Any) -> None:
            values = {name: arguments.pop(name) for name in flags}
            command(**arguments, **_gathered(flags, values))

        with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {one.name: one.annotation for one in parameters}
        return with_options

    return decorate


def _united(flags: Mapping[str, Iterable[OptionFlag]]) -> dict[str, dict[str, OptionFlag]]:
    """Gather flags by name, each by owner; those that every owner has come last."""
    united: dict[str, dict[str, OptionFlag]] = {}
    for owner, owned in flags.items():
        for flag in owned:
            united.setdefault(flag.name, {})[owner] = flag
    return dict(sorted(united.items(), key=lambda item: len(item[1]) == len(flags)))


def _parameter(name: str, uses: Mapping[str, OptionFlag], num_owners: int, panel: str) -> inspect.Parameter:
    """Make the parameter that Typer turns into a flag."""
    types = {flag.value_type for flag in uses.values()}
    value_type: Any = types.pop() if len(types) == 1 else str
    default = _default_of({owner: flag.default for owner, flag in uses.items()})
    option = typer.Option(help=_help_of(uses, num_owners), show_default=default or False, rich_help_panel=panel)
    annotation = Annotated[value_type | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help_of(uses: Mapping[str, OptionFlag], num_owners: int) -> str:
    """Join the help of a flag's owners, who are named where not all of them have it."""
    owners: dict[str, list[str]] = {}
    for owner, flag in uses.items():
        owners.setdefault(flag.help, []).append(owner)
    if len(owners) == 1 and len(uses) == num_owners:
        return next(iter(owners))
    return " ".join(f"{text.removesuffix('.')} ({', '.join(names)})." for text, names in owners.items())


def _default_of(defaults: Mapping[str, str | None]) -> str:
    """Write a flag's defaults, and whose they are where owners differ."""
    owners: dict[str, list[str]] = {}
    for owner, default in defaults.items():
        if default is not None:
            owners.setdefault(default, []).append(owner)
    if len(owners) < 2:
        return next(iter(owners), "")
    most_common = max(owners, key=lambda default: len(owners[default]))
    if len(owners[most_common]) > _FEW:
        owners[most_common] = ["others"]
        owners = {default: names for default, names in owners.items() if default != most_common} | {
            most_common: owners[most_common]
        }
    return ", ".join(f"{default} of {_listed(names)}" for default, names in owners.items())


def _listed(names: list[str]) -> str:
    """Write names as a list in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _gathered(flags: Mapping[str, Mapping[str, OptionFlag]], values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the values of flags into options: those that were given, with the flags of one option put together."""
    options: dict[str, Any] = {}
    for name, uses in flags.items():
        flag = next(iter(uses.values()))
        if values[name] is None:
            continue
        if flag.key is None:
            options[flag.option] = values[name]
        else:
            options.setdefault(flag.option, {})[flag.key] = values[name]
    return options
