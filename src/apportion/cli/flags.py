"""Command-line flags built from option models. Models that share an option share its flag."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from apportion.records.options import OptionFlag, Options

_MAX_NAMED = 3  # owners of the most common default that are listed by name


def option_flags(models: Mapping[str, type[Options]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's ``**options`` by the flags of option models.

    The command receives only the options that were given. A flag given with its default value counts as given. The
    caller must check that the chosen model has the option.

    Args:
        models: Option models by owner, such as a method's name. The owners appear in the help if models differ.

    Returns:
        A decorator for Typer commands that end in ``**options``.
    """
    flags = _by_name({owner: model.flags() for owner, model in models.items()})
    panel = next(iter(models.values())).panel

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        declared = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters = [*declared, *(_parameter(name, uses, len(models), panel) for name, uses in flags.items())]

        @functools.wraps(command)
        def with_options(**arguments: Any) -> None:
            values = {name: arguments.pop(name) for name in flags}
            command(**arguments, **_given_options(flags, values))

        with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {one.name: one.annotation for one in parameters}
        return with_options

    return decorate


def _by_name(flags: Mapping[str, Iterable[OptionFlag]]) -> dict[str, dict[str, OptionFlag]]:
    """Group flags by name, then by owner; flags that all owners share come last."""
    by_name: dict[str, dict[str, OptionFlag]] = {}
    for owner, owner_flags in flags.items():
        for flag in owner_flags:
            by_name.setdefault(flag.name, {})[owner] = flag
    return dict(sorted(by_name.items(), key=lambda item: len(item[1]) == len(flags)))


def _parameter(name: str, uses: Mapping[str, OptionFlag], num_owners: int, panel: str) -> inspect.Parameter:
    """Make the parameter that Typer turns into a flag."""
    types = {flag.value_type for flag in uses.values()}
    value_type: Any = types.pop() if len(types) == 1 else str
    default = _default_of({owner: flag.default for owner, flag in uses.items()})
    option = typer.Option(help=_help_of(uses, num_owners), show_default=default or False, rich_help_panel=panel)
    annotation = Annotated[value_type | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help_of(uses: Mapping[str, OptionFlag], num_owners: int) -> str:
    """Join the help texts of a flag's owners; name the owners unless all have the flag with the same text."""
    owners: dict[str, list[str]] = {}
    for owner, flag in uses.items():
        owners.setdefault(flag.help, []).append(owner)
    if len(owners) == 1 and len(uses) == num_owners:
        return next(iter(owners))
    return " ".join(f"{text.removesuffix('.')} ({', '.join(names)})." for text, names in owners.items())


def _default_of(defaults: Mapping[str, str | None]) -> str:
    """Format a flag's defaults; name the owners if they differ."""
    owners: dict[str, list[str]] = {}
    for owner, default in defaults.items():
        if default is not None:
            owners.setdefault(default, []).append(owner)
    if len(owners) < 2:
        return next(iter(owners), "")
    most_common = max(owners, key=lambda default: len(owners[default]))
    if len(owners[most_common]) > _MAX_NAMED:
        owners[most_common] = ["others"]
        owners = {default: names for default, names in owners.items() if default != most_common} | {
            most_common: owners[most_common]
        }
    return ", ".join(f"{default} for {_join_names(names)}" for default, names in owners.items())


def _join_names(names: list[str]) -> str:
    """Join names with commas and "and"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _given_options(flags: Mapping[str, Mapping[str, OptionFlag]], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the flags that were given; flags of one mapping option are merged."""
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
