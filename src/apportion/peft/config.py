"""The adapter's configuration: PEFT's LoRA configuration with the plan as a field."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, get_type_hints

from peft import LoraConfig
from peft.utils import PeftType
from pydantic import Field, PydanticUserError, StrictBool, TypeAdapter, ValidationError

from apportion.adapters.shapes.sparse import SparseOptions
from apportion.errors import AdapterError, ConfigurationError
from apportion.records.numbers import AnyFloat, WholeNumber, first_problem
from apportion.records.plan import Plan

PEFT_TYPE = "APPORTION"

_VARIANTS = (
    "use_dora", "use_rslora", "use_qalora", "use_bdlora", "lora_bias", "target_parameters", "modules_to_save",
    "layers_to_transform", "layer_replication", "trainable_token_indices", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config", "megatron_config",
)  # fmt: skip


@dataclass
class _Below:
    """An adapter that was merged into the base model: its folder, and the hash of its tensors."""

    path: str
    sha256: str


_TYPES: dict[str, Any] = {  # types of fields in the file that differ from PEFT's or from those in Python
    "plan": dict[str, Any],
    "lora_alpha": AnyFloat,
    "alpha_pattern": dict[str, float],
    "rank_pattern": dict[str, int],
    "on_top_of": _Below | None,
    "lora_dropout": Annotated[float, Field(ge=0, lt=1, strict=True)],
    "init_lora_weights": StrictBool,
}


@dataclass
class ApportionConfig(LoraConfig):
    """Contents of ``adapter_config.json``.

    Args:
        plan: The plan, as an object or as `Plan.as_dict` returns it. It alone determines which sites are adapted.
        init_seed: Seed of the factors' initial values.
        dense_b: Whether sparse placements train all of B, to find out which entries to keep.
        store_a: Whether checkpoints contain the frozen A. Otherwise it is drawn again from the seed.
        a_checksum: SHA-256 of the frozen A that the adapter was trained with.
        tensor_digests: Hashes of the adapter's tensors, as `apportion.peft.state.digests` returns them.
        on_top_of: The adapter that was merged into the base model before training: ``path`` and ``sha256``.
    """

    plan: Any = field(default_factory=dict, metadata={"help": "The plan, as apportion writes it to plan.json"})
    init_seed: int = field(default=0, metadata={"help": "Seed of the factors' initial values"})

    dense_b: bool = field(default=False, metadata={"help": "Whether sparse placements train all of B"})
    store_a: bool = field(default=False, metadata={"help": "Whether checkpoints contain the frozen A"})
    a_checksum: str | None = field(default=None, metadata={"help": "SHA-256 of the frozen A"})
    tensor_digests: str | None = field(default=None, metadata={"help": "Hashes of the adapter's tensors"})
    on_top_of: dict[str, str] | None = field(default=None, metadata={"help": "An adapter merged into the base before"})

    def __post_init__(self) -> None:
        """Set the type, and reject LoRA variants that would apply only to some of the planned sites."""
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        self.promised_digests, self.tensor_digests = self.tensor_digests, None  # as read; to be written
        if not isinstance(self.plan, Plan):
            self.plan = Plan.from_dict(self.plan)
        for name in _VARIANTS:
            if getattr(self, name, None):
                raise ConfigurationError(
                    f"{name} cannot be combined with a plan.", fix="remove it from the adapter's configuration"
                )

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Check the types of a file's fields. PEFT calls this before it reads them.

        Args:
            **kwargs: The fields.

        Returns:
            The same fields.

        Raises:
            AdapterError: a field has the wrong type, or a number is out of range.
        """
        validators = _validators()
        for name in [name for name in kwargs if name in validators]:
            try:
                validators[name].validate_python(kwargs[name])
            except ValidationError as error:
                place, problem = first_problem(error)
                inner = "" if place == "the whole file" else f".{place}"
                raise AdapterError(
                    "the adapter's configuration is damaged.",
                    place=f"{name}{inner}",
                    found=str(problem),
                    fix="copy adapter_config.json again, or train the adapter again",
                ) from error
        fields: dict[str, Any] = super().check_kwargs(**kwargs)
        return fields

    @property
    def sparse(self) -> SparseOptions:
        """How sparse factors train and are stored."""
        return SparseOptions(dense_b=self.dense_b, stored_a=self.store_a)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain data, as in its file.

        Returns:
            The fields by name.
        """
        shallow = copy.copy(self)
        shallow.plan = {}
        fields: dict[str, Any] = LoraConfig.to_dict(shallow)
        return fields | {"plan": self.plan.as_dict()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``.

        Args:
            save_directory: The adapter's folder.
            **kwargs: As PEFT takes them.
        """
        super().save_pretrained(save_directory, **kwargs)
        self.tensor_digests = None  # they are those of the saved tensors, which may change from here on


@cache
def _validators() -> dict[str, TypeAdapter[Any]]:
    """Build validators for the fields that have a type pydantic can check."""
    validators = {name: TypeAdapter[Any](checked) for name, checked in _TYPES.items()}
    for name, hint in get_type_hints(ApportionConfig).items():
        with suppress(PydanticUserError):  # PEFT's own settings classes, which PEFT checks
            validators.setdefault(name, TypeAdapter[Any]({bool: StrictBool, int: WholeNumber}.get(hint, hint)))
    return validators
