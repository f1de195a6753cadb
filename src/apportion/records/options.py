"""Options of methods and of training procedures: the one place that says their names, types, defaults and meaning.

The command line makes its flags from these models, `apportion methods` lists them, and methods and training are handed
them whole. Whether an option was given is asked of `Options.given`, never of its value.
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
    """How the command line shows an option, where its field alone does not say so.

    Args:
        default: The default in words.
        stem: Of an option that maps names to values: the start of its flags, which are one per name.
        names: Those names.
    """

    default: str | None = None
    stem: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptionFlag:
    """One flag of the command line.

    Args:
        name: Its name with underscores; the flag has dashes.
        option: The option that it sets.
        key: The entry of the option that it sets, of an option that maps names to values.
        value_type: What its text is turned into before the option's own validation.
        help: What it says about itself.
        default: The default in words; None where there is nothing to show.
    """

    name: str
    option: str
    key: str | None
    value_type: type
    help: str
    default: str | None

    @property
    def spelling(self) -> str:
        """The flag as it is typed."""
        return "--" + self.name.replace("_", "-")


class Options(BaseModel):
    """Base of all option models: frozen, and strict about names.

    Args:
        **values: The options.

    Raises:
        ConfigurationError: an option is unknown or wrong, or two that exclude each other were both given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    panel: ClassVar[str] = "Options"
    alternatives: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _explained(error, type(self)) from error

    @model_validator(mode="after")
    def _refuse_both(self) -> Options:
        for first, second in self.alternatives:
            if first in self.given and second in self.given:
                raise ConfigurationError(f"{first} and {second} were both given.", fix="give one of them")
        return self

    @property
    def given(self) -> tuple[str, ...]:
        """The options that were given, with a default's value or another; None counts as not given."""
        fields_set = self.model_fields_set
        return tuple(name for name in type(self).model_fields if name in fields_set and getattr(self, name) is not None)

    @classmethod
    def differing(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of complete options, as a plan's file has them, that differ from the defaults.

        A complete record does not say what was given, and may name options that exclude each other.

        Args:
            options: Plain data, as ``model_dump(mode="json")`` returns it.

        Returns:
            What to give in order to get the same options again.
        """
        defaults = cls().model_dump(mode="json")
        return {name: value for name, value in options.items() if name not in defaults or value != defaults[name]}

    @classmethod
    def flags(cls) -> list[OptionFlag]:
        """List the command line's flags for these options, in the fields' order."""
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
    """Validate options that came by name, and say whose they are where one is wrong.

    Args:
        model: What they should be.
        values: The options that were given.
        owner: Whose options they are, such as ``method lora``.

    Returns:
        The options.

    Raises:
        ConfigurationError: an option is unknown or wrong, or two that exclude each other were both given.
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


def _explained(error: ValidationError, model: type[Options]) -> ConfigurationError:
    """Say what is wrong with the first wrong option, in a validator's own words where it has some."""
    first = error.errors()[0]
    reason = first.get("ctx", {}).get("error")
    if isinstance(reason, ConfigurationError):
        return reason
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return ConfigurationError(
            f"there is no option {name!r}.", details={"options": ", ".join(sorted(model.model_fields))}
        )
    return ConfigurationError(f"the option {name}={first['input']!r} is wrong: {reason or first['msg']}.")


def _value_type(field: FieldInfo) -> type:
    """Tell what the command line turns a flag's text into: a number or a switch, or nothing where a parser reads it."""
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
    """Write a default as it would be typed; None where there is nothing to show."""
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

_TARGETS = (
    f"What is adapted: any of {', '.join(KINDS)}, or single projections such as experts.down, separated by commas."
)
_SPARSITY = "Share of the entries of B that stay zero, with A frozen; 0 for whole factors."
_PLAIN_BUDGET = "The most that may be spent: parameters (5000000) or operations per token (flops=80000)."


class MethodOptions(Options):
    """Options that every method takes; a method with more of them has a subclass."""

    panel: ClassVar[str] = "Method options"

    targets: Annotated[Targets, Shown("all")] = Field(ALL_TARGETS, description=_TARGETS)
    layers: Annotated[str | None, AfterValidator(check_layers), Shown("all")] = Field(
        None, description="Decoder layers that are adapted: 4-15 or 0,2,4-7."
    )
    ranks: Annotated[dict[str, int], AfterValidator(check_ranks), Shown("--rank", "rank", KINDS)] = Field(
        {}, description="Rank of this kind of sites, where it differs; the scale alpha / rank stays the plan's."
    )
    sparsity: Sparsity = Field(0.0, description=_SPARSITY)


class HotOptions(MethodOptions):
    """Options of the methods that choose experts."""

    hot: Annotated[int | str, BeforeValidator(parse_hot)] = Field(
        8,
        validate_default=True,
        description="Experts kept per layer: a number such as 8, a percentage such as 25%, or coverage=0.6 for as many "
        "as cover that share of the routed slots.",
    )
    criterion: Criterion = Field(
        "count",
        description="What makes an expert hot: count (how often it is selected), mass (summed routing weights), "
        "sensitivity (squared gradient norm), or sensitivity_count, the product of sensitivity and count.",
    )


class LoriOptions(MethodOptions):
    """Options of `lori`: those of `lora`, with a B that is sparse by default."""

    sparsity: Sparsity = Field(0.9, description=_SPARSITY)


class HelloriOptions(HotOptions):
    """Options of `hellori`: those of `hellora`, with a B that is sparse by default."""

    sparsity: Sparsity = Field(0.9, description=_SPARSITY)


class GradientOptions(MethodOptions):
    """Options of `gradient`."""

    alternatives: ClassVar[tuple[tuple[str, str], ...]] = (("keep", "budget"),)

    keep: Share = Field(
        0.25,
        description="Share of the targeted matrices that get an adapter, of those with a gradient: 0.25 or 25%.",
    )
    budget: PlainBudget = Field(None, description=_PLAIN_BUDGET)
    per: Literal["matrix", "parameter"] = Field(
        "matrix", description="What is compared: the squared gradient norm of a whole matrix, or per parameter of it."
    )


class MarginalOptions(MethodOptions):
    """Options of `marginal`. The exponents' defaults were measured by ``benchmarks/marginal_calibration.py``.

    Adam makes gains first order in the gradient: they go with its norm and with its singular values.
    """

    budget: PlainBudget = Field(None, description=_PLAIN_BUDGET)
    max_rank: Annotated[int | None, Field(ge=1), Shown("its smaller side")] = Field(
        None, description="The largest rank that a matrix may get."
    )
    sensitivity_power: Positive = Field(
        0.5,
        description="Exponent of a matrix's share of the squared gradient norms in its estimated gain.",
    )
    rank_decay: Positive = Field(
        2.0,
        description="How fast the gain of further ranks falls: the i-th rank gains i ** -rank_decay of the first.",
    )


class RoutedOptions(MethodOptions):
    """Options of the methods that place several LoRA experts on a matrix, outside the routed experts by default."""

    targets: Targets = Field(LINEAR_TARGETS, description=_TARGETS)
    top_k: Annotated[int, Field(ge=1)] = Field(
        2, description="LoRA experts that a token uses at a matrix; all of them where it has fewer."
    )


class BudgetOptions(RoutedOptions):
    """Options of the methods that can be told how many LoRA experts to spend."""

    budget: Annotated[str | None, BeforeValidator(parse_budget)] = Field(
        None,
        description="The most that may be spent: parameters (5000000), operations per token (flops=80000) or LoRA "
        "experts (experts=688).",
    )


class VoteOptions(BudgetOptions):
    """Options of the methods that count votes."""

    alternatives: ClassVar[tuple[tuple[str, str], ...]] = (("keep", "budget"),)

    keep: Share = Field(
        0.6, description="Share of a group's matrices that every task votes for, where no budget is given: 0.6 or 60%."
    )
    groups: Groups = Field(
        "attention/mlp",
        description="What is ranked together: attention/mlp (attention apart from MLP), type (each projection type "
        "apart) or all.",
    )


class MolaOptions(RoutedOptions):
    """Options of `mola`; ``2-4-6-8``, ``8-6-4-2``, ``8-2-2-8`` and ``5-5-5-5`` are the published shapes."""

    experts: Annotated[str, BeforeValidator(parse_depths)] = Field(
        "2-4-6-8", description="LoRA experts per matrix, from the first part of the layers to the last: 2-4-6-8."
    )


class UniformOptions(BudgetOptions):
    """Options of `uniform`."""

    alternatives: ClassVar[tuple[tuple[str, str], ...]] = (("experts", "budget"),)

    experts: Annotated[int, Field(ge=1)] = Field(5, description="LoRA experts per matrix, where no budget is given: 5.")


class SparseTraining(Options):
    """Options of LoRI's two phases, which sparse plans are trained in."""

    panel: ClassVar[str] = "Sparse plans (lori, hellori)"

    dense_steps: Annotated[int | None, Shown("a tenth of the steps")] = Field(
        None, description="Steps of the first phase, in which all of B trains to find the mask."
    )
    dense_lr: Annotated[float | None, Shown("a tenth of --lr")] = Field(
        None, description="Peak learning rate of the first phase."
    )
    mask_granularity: Granularity = Field(
        "global", description="Where the largest entries of B are kept: global, layer, site or projection."
    )
    redraw_a: bool = Field(
        default=False, description="Draw another A after the mask is found, as LoRI's released code does."
    )
    store_a: bool = Field(default=False, description="Keep the frozen A in the checkpoint.")

    @field_validator("dense_steps")
    @classmethod
    def _warms_up(cls, value: int | None) -> int | None:
        if value is not None and value < 2:
            raise ConfigurationError(
                f"dense_steps={value} finds no mask: the first step warms up.", fix="give at least 2"
            )
        return value

    @field_validator("dense_lr")
    @classmethod
    def _trains(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < math.inf:
            raise ConfigurationError(f"dense_lr={value} trains nothing.", fix="give a number above 0")
        return value
