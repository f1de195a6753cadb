"""Options of methods and of training procedures: names, types, defaults and help texts.

The command line builds its flags from these models, and `apportion methods` lists them. Use `Options.given` to check
whether an option was given; never compare its value with the default.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from apportion.errors import ConfigurationError
from apportion.records.option_texts import (
    check_layers,
    check_ranks,
    parse_budget,
    parse_depths,
    parse_hot,
    parse_plain_budget,
    parse_share,
    parse_targets,
)
from apportion.records.site import KINDS

Criterion = Literal["count", "mass", "sensitivity", "sensitivity_count"]
Groups = Literal["attention/mlp", "type", "all"]
Granularity = Literal["global", "layer", "site", "projection"]

ALL_TARGETS: tuple[str, ...] = KINDS
LINEAR_TARGETS: tuple[str, ...] = tuple(kind for kind in KINDS if kind in ("attention", "shared", "dense"))


@dataclass(frozen=True)
class Shown:
    """How the command line shows an option, if its field is not enough.

    Args:
        default: The default in words.
        stem: Prefix of the flags of an option that maps names to values (one flag per name).
        names: The names.
    """

    default: str | None = None
    stem: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptionFlag:
    """One flag of the command line.

    Args:
        name: Name with underscores; the flag has dashes.
        option: The option that it sets.
        key: The entry that it sets, if the option maps names to values.
        value_type: Type that the text is converted to before the option is validated.
        help: Help text.
        default: The default in words; None to show no default.
    """

    name: str
    option: str
    key: str | None
    value_type: type
    help: str
    default: str | None

    @property
    def spelling(self) -> str:
        """The flag as typed on the command line."""
        return "--" + self.name.replace("_", "-")


class Options(BaseModel):
    """Base of all option models. Frozen; unknown names are refused.

    Args:
        **values: The options.

    Raises:
        ConfigurationError: an option is unknown or invalid, or two mutually exclusive options were given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    panel: ClassVar[str] = "Options"
    alternatives: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _as_configuration_error(error, type(self)) from error

    @model_validator(mode="after")
    def _check_alternatives(self) -> Options:
        for first, second in self.alternatives:
            if first in self.given and second in self.given:
                raise ConfigurationError(f"{first} and {second} were both given.", fix="give one of them")
        return self

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the options that were given, even if equal to the default. None counts as not given."""
        fields_set = self.model_fields_set
        return tuple(name for name in type(self).model_fields if name in fields_set and getattr(self, name) is not None)

    @classmethod
    def differing(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that differ from the defaults.

        A plan's file stores all options, including defaults and options that exclude each other. It does not say which
        were given.

        Args:
            options: All options as plain data, as returned by ``model_dump(mode="json")``.

        Returns:
            The options to pass to get the same options again.
        """
        defaults = cls().model_dump(mode="json")
        return {name: value for name, value in options.items() if name not in defaults or value != defaults[name]}

    @classmethod
    def flags(cls) -> list[OptionFlag]:
        """Return the command-line flags of these options, in field order."""
        flags = []
        for name, field in cls.model_fields.items():
            shown = next((one for one in field.metadata if isinstance(one, Shown)), Shown())
            default = _default_text(field.default) if shown.default is None else shown.default
            value_type = _value_type(field)
            help_text = field.description or ""
            if shown.names:
                flags += [
                    OptionFlag(f"{shown.stem}_{key}", name, key, value_type, help_text, default) for key in shown.names
                ]
            else:
                flags.append(OptionFlag(name, name, None, value_type, help_text, default))
        return flags


AnyOptions = TypeVar("AnyOptions", bound=Options)


def read_options(model: type[AnyOptions], values: Mapping[str, Any], owner: str) -> AnyOptions:
    """Validate options given by name. Errors name the owner.

    Args:
        model: Option model to validate against.
        values: The options that were given.
        owner: Owner of the options, such as ``method lora``.

    Returns:
        The options.

    Raises:
        ConfigurationError: an option is unknown or invalid, or two mutually exclusive options were given.
    """
    for name in values:
        if name not in model.model_fields:
            raise ConfigurationError(
                f"{owner} has no option {name!r}.", details={"options": ", ".join(sorted(model.model_fields))}
            )
    try:
        return model(**values)
    except ConfigurationError as error:
        raise ConfigurationError(str(error), place=owner) from error


def _as_configuration_error(error: ValidationError, model: type[Options]) -> ConfigurationError:
    """Return an error for the first invalid option, with the validator's own message if there is one."""
    first = error.errors()[0]
    reason = first.get("ctx", {}).get("error")
    if isinstance(reason, ConfigurationError):
        return reason
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return ConfigurationError(
            f"there is no option {name!r}.", details={"options": ", ".join(sorted(model.model_fields))}
        )
    return ConfigurationError(f"the option {name}={first['input']!r} is invalid: {reason or first['msg']}.")


def _value_type(field: FieldInfo) -> type:
    """Return the type that a flag's text is converted to: int, float or bool; str if a parser reads the text."""
    if any(isinstance(one, BeforeValidator) for one in field.metadata):
        return str
    kind: Any = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [one for one in get_args(kind) if one is not type(None)]
        kind = kinds[0] if len(kinds) == 1 else str
    if get_origin(kind) is dict:
        kind = get_args(kind)[1]
    return kind if kind in (int, float, bool) else str


def _default_text(value: Any) -> str | None:
    """Format a default as typed on the command line; None to show no default."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


Targets = Annotated[tuple[str, ...], BeforeValidator(parse_targets)]
Share = Annotated[float, BeforeValidator(parse_share), Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PlainBudget = Annotated[str | None, BeforeValidator(parse_plain_budget)]
Sparsity = Annotated[float, Field(ge=0, lt=1)]

_TARGETS = f"What to adapt: any of {', '.join(KINDS)}, or single projections such as experts.down, separated by commas."
_SPARSITY = "Share of the entries of B that stay zero, with A frozen; 0 for dense factors."
_PLAIN_BUDGET = "Maximum number of parameters (5000000) or operations per token (flops=80000)."


class MethodOptions(Options):
    """Options of every method. Methods with more options use a subclass."""

    panel: ClassVar[str] = "Method options"

    targets: Annotated[Targets, Shown("all")] = Field(ALL_TARGETS, description=_TARGETS)
    layers: Annotated[str | None, AfterValidator(check_layers), Shown("all")] = Field(
        None, description="Decoder layers to adapt: 4-15 or 0,2,4-7."
    )
    ranks: Annotated[dict[str, int], AfterValidator(check_ranks), Shown("--rank", "rank", KINDS)] = Field(
        {}, description="Rank of sites of this kind; the scale alpha / rank does not change."
    )
    sparsity: Sparsity = Field(0.0, description=_SPARSITY)


class HotOptions(MethodOptions):
    """Options of the methods that choose experts."""

    hot: Annotated[int | str, BeforeValidator(parse_hot)] = Field(
        8,
        validate_default=True,
        description="Experts kept per layer: a number (8), a percentage (25%), or coverage=0.6 for as many as cover "
        "that share of the routed slots.",
    )
    criterion: Criterion = Field(
        "count",
        description="Rank experts by count (how often selected), mass (summed routing weights), sensitivity (squared "
        "gradient norm), or sensitivity_count (sensitivity times count).",
    )


class LoriOptions(MethodOptions):
    """Options of `lori`: the same as `lora`, with a sparse B by default."""

    sparsity: Sparsity = Field(0.9, description=_SPARSITY)


class HelloriOptions(HotOptions):
    """Options of `hellori`: the same as `hellora`, with a sparse B by default."""

    sparsity: Sparsity = Field(0.9, description=_SPARSITY)


class GradientOptions(MethodOptions):
    """Options of `gradient`."""

    alternatives: ClassVar[tuple[tuple[str, str], ...]] = (("keep", "budget"),)

    keep: Share = Field(
        0.25,
        description="Share of the targeted matrices (with a gradient) that get an adapter: 0.25 or 25%.",
    )
    budget: PlainBudget = Field(None, description=_PLAIN_BUDGET)
    per: Literal["matrix", "parameter"] = Field(
        "matrix", description="Rank by the squared gradient norm of the whole matrix, or per parameter."
    )


class MarginalOptions(MethodOptions):
    """Options of `marginal`.

    The default exponents were measured by ``benchmarks/marginal_calibration.py``. With Adam, gains are first order in
    the gradient: they scale with its norm and its singular values.
    """

    budget: PlainBudget = Field(None, description=_PLAIN_BUDGET)
    max_rank: Annotated[int | None, Field(ge=1), Shown("smaller side of the matrix")] = Field(
        None, description="Maximum rank of a matrix."
    )
    sensitivity_power: Positive = Field(
        0.5,
        description="Estimated gain of a matrix: its share of the squared gradient norms to this power.",
    )
    rank_decay: Positive = Field(
        2.0,
        description="Decay of the gain with rank: the i-th rank gains i ** -rank_decay times the first.",
    )


class RoutedOptions(MethodOptions):
    """Options of the methods that place several LoRA experts per matrix. By default, routed experts are not adapted."""

    targets: Targets = Field(LINEAR_TARGETS, description=_TARGETS)
    top_k: Annotated[int, Field(ge=1)] = Field(
        2, description="LoRA experts used per token and matrix; all if a matrix has fewer."
    )


class BudgetOptions(RoutedOptions):
    """Options of the methods that accept a budget of LoRA experts."""

    budget: Annotated[str | None, BeforeValidator(parse_budget)] = Field(
        None,
        description="Maximum number of parameters (5000000), operations per token (flops=80000) or LoRA experts "
        "(experts=688).",
    )


class VoteOptions(BudgetOptions):
    """Options of the methods that count votes."""

    alternatives: ClassVar[tuple[tuple[str, str], ...]] = (("keep", "budget"),)

    keep: Share = Field(
        0.6, description="Share of a group's matrices that each task votes for, if no budget is given: 0.6 or 60%."
    )
    groups: Groups = Field(
        "attention/mlp",
        description="Matrices ranked together: attention/mlp (attention and MLP separately), type (each projection "
        "type separately) or all.",
    )


class MolaOptions(RoutedOptions):
    """Options of `mola`; ``2-4-6-8``, ``8-6-4-2``, ``8-2-2-8`` and ``5-5-5-5`` are the published shapes."""

    experts: Annotated[str, BeforeValidator(parse_depths)] = Field(
        "2-4-6-8", description="LoRA experts per matrix for each part of the layers, first to last: 2-4-6-8."
    )


class UniformOptions(BudgetOptions):
    """Options of `uniform`."""

    alternatives: ClassVar[tuple[tuple[str, str], ...]] = (("experts", "budget"),)

    experts: Annotated[int, Field(ge=1)] = Field(5, description="LoRA experts per matrix, if no budget is given.")


class SparseTraining(Options):
    """Options of LoRI's two training phases, used for sparse plans."""

    panel: ClassVar[str] = "Sparse plans (lori, hellori)"

    dense_steps: Annotated[int | None, Shown("a tenth of the steps")] = Field(
        None, description="Steps of the first phase, which trains all of B to find the mask."
    )
    dense_lr: Annotated[float | None, Shown("a tenth of --lr")] = Field(
        None, description="Peak learning rate of the first phase."
    )
    mask_granularity: Granularity = Field(
        "global", description="Scope in which the largest entries of B are kept: global, layer, site or projection."
    )
    redraw_a: bool = Field(
        default=False, description="Draw a new A after the mask is found, as LoRI's released code does."
    )
    store_a: bool = Field(default=False, description="Keep the frozen A in the checkpoint.")

    @field_validator("dense_steps")
    @classmethod
    def _check_dense_steps(cls, value: int | None) -> int | None:
        if value is not None and value < 2:
            raise ConfigurationError(
                f"dense_steps={value} is too small to find a mask: the first step is warm-up.", fix="give at least 2"
            )
        return value

    @field_validator("dense_lr")
    @classmethod
    def _check_dense_lr(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < math.inf:
            raise ConfigurationError(f"dense_lr={value} is not a positive number.", fix="give a number above 0")
        return value
