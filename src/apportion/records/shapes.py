"""`Shape`: the form of one adapter as pure data, and what it is made of at a site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

from pydantic import ConfigDict, TypeAdapter, ValidationError

from apportion.errors import PlanError, shortened
from apportion.records.numbers import AnyFloat, WholeNumber, first_problem

MAX_WIDTH = 65_536  # rank of all LoRA experts of a site together: above every matrix of a known model
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**127  # in float32, in which adapters are computed


class Part(NamedTuple):
    """One tensor of an adapter.

    Args:
        entries: Its numbers, kept or not.
        trains: Whether the optimizer moves it; what does not train is drawn from a seed.
        keep_frac: Share of the entries that exist. The entries of one share are rounded up together, over all sites.
        shared: Where several sites share the tensor, its name; tensors of one name are one.
    """

    entries: int
    trains: bool = True
    keep_frac: float = 1.0
    shared: str | None = None


class Shape(Protocol):
    """The form of one adapter. It knows what it is made of and what it costs on a matrix, and no model.

    A shape is a frozen dataclass whose fields are plain data or shapes. `register` makes plan files know it.
    """

    kind: ClassVar[str]

    def __hash__(self) -> int:
        """Hash the fields: equal shapes are counted and written together."""

    @property
    def rank(self) -> int:
        """Rank of the factors, of every LoRA expert where there are several."""

    @property
    def alpha(self) -> float:
        """Scale numerator: the adapter's output is multiplied by alpha / rank."""

    @property
    def lora_rank(self) -> int | None:
        """Rank of the stock LoRA that equals the adapter; None where none does, since a gate depends on the input."""

    def parts(self, in_features: int, out_features: int) -> Iterator[Part]:
        """Give the adapter's tensors on a matrix.

        Args:
            in_features: Width of the matrix's input.
            out_features: Width of its output.

        Returns:
            The tensors, one by one.
        """

    def flops(self, in_features: int, out_features: int) -> int:
        """Count the operations that the adapter adds per token that meets it: two per multiply-add.

        Args:
            in_features: Width of the matrix's input.
            out_features: Width of its output.

        Returns:
            Operations of the forward pass.
        """


@dataclass(frozen=True)
class _Factors:
    """Two factors at a scale."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    rank: WholeNumber
    alpha: AnyFloat

    def __post_init__(self) -> None:
        """Refuse numbers that no adapter can have."""
        if not 1 <= self.rank <= MAX_WIDTH:
            raise PlanError(f"an adapter has rank {self.rank}.", fix=f"give a whole number from 1 to {MAX_WIDTH}")
        if not SMALLEST_SCALE <= self.alpha / self.rank <= LARGEST_SCALE:
            raise PlanError(
                f"an adapter has alpha {self.alpha} and rank {self.rank}: float32 cannot hold the scale alpha / rank.",
                fix="give an alpha near the rank, such as twice the rank",
            )

    @property
    def lora_rank(self) -> int:
        """Rank of the stock LoRA that equals the adapter."""
        return self.rank

    def flops(self, in_features: int, out_features: int) -> int:
        """Count the operations per token; products with sparse factors are dense."""
        return 2 * self.rank * (in_features + out_features)


@dataclass(frozen=True)
class LowRank(_Factors):
    """LoRA: both factors train.

    Args:
        rank: Rank of the factors.
        alpha: Scale numerator.

    Source: LoRA, arXiv:2106.09685.
    """

    kind: ClassVar[str] = "low_rank"

    def parts(self, in_features: int, out_features: int) -> Iterator[Part]:
        """Give A of shape (rank, in) and B of shape (out, rank)."""
        yield Part(self.rank * in_features)
        yield Part(self.rank * out_features)


@dataclass(frozen=True)
class Sparse(_Factors):
    """LoRI: A stays as it is drawn, and only some entries of B exist.

    Args:
        rank: Rank of the factors.
        alpha: Scale numerator.
        sparsity: Share of the entries of B that stay zero, above 0 and below 1.

    Source: LoRI, arXiv:2504.07448.
    """

    kind: ClassVar[str] = "sparse"

    sparsity: AnyFloat

    def __post_init__(self) -> None:
        """Refuse numbers that no adapter can have."""
        super().__post_init__()
        if not 0 < self.sparsity < 1:
            raise PlanError(f"an adapter has sparsity {self.sparsity}.", fix="give a share above 0 and below 1")

    def parts(self, in_features: int, out_features: int) -> Iterator[Part]:
        """Give the frozen A and the kept entries of B."""
        yield Part(self.rank * in_features, trains=False)
        yield Part(self.rank * out_features, keep_frac=1 - self.sparsity)


@dataclass(frozen=True)
class Routed:
    """LoRA-SMoE: several LoRA experts of one shape, and a linear router that weighs them per token.

    Args:
        expert: The shape of every LoRA expert.
        num_experts: LoRA experts, at least 2.
        top_k: LoRA experts that a token uses.

    Source: LoRA-SMoE, arXiv:2505.06272.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: ClassVar[str] = "routed"

    expert: LowRank | Sparse
    num_experts: WholeNumber
    top_k: WholeNumber

    def __post_init__(self) -> None:
        """Refuse numbers that no adapter can have."""
        if not 1 <= self.top_k <= self.num_experts:
            raise PlanError(
                f"an adapter has {self.num_experts} LoRA experts and cannot use {self.top_k} of them for a token.",
                fix="give a top_k of at least 1 and at most the number of experts",
            )
        if self.num_experts < 2 or self.num_experts * self.expert.rank > MAX_WIDTH:
            raise PlanError(
                f"an adapter has {self.num_experts} LoRA experts of rank {self.expert.rank}.",
                fix=f"give at least 2; experts times rank may be at most {MAX_WIDTH}",
            )

    @property
    def rank(self) -> int:
        """Rank of every LoRA expert."""
        return self.expert.rank

    @property
    def alpha(self) -> float:
        """Scale numerator of every LoRA expert."""
        return self.expert.alpha

    @property
    def lora_rank(self) -> None:
        """No stock LoRA equals the adapter: its gates depend on the input."""
        return

    def parts(self, in_features: int, out_features: int) -> Iterator[Part]:
        """Give the experts' factors one below the other, and the router of shape (experts, in)."""
        for part in self.expert.parts(in_features, out_features):
            yield part._replace(entries=self.num_experts * part.entries)
        yield Part(self.num_experts * in_features)

    def flops(self, in_features: int, out_features: int) -> int:
        """Count the operations per token: all experts' factors run, since one product serves them all."""
        return self.num_experts * (self.expert.flops(in_features, out_features) + 2 * in_features)


_KINDS: dict[str, type[Any]] = {}


def register(shape: type[Any]) -> type[Any]:
    """Make plan files know a shape.

    Args:
        shape: A frozen dataclass with a ``kind``, as `Shape` describes it.

    Returns:
        The same class, so that this works as a decorator.

    Raises:
        ValueError: another shape has its kind.
    """
    if _KINDS.setdefault(shape.kind, shape) is not shape:
        raise ValueError(f"there is a shape {shape.kind!r} already.")
    return shape


for _shape in (LowRank, Sparse, Routed):
    register(_shape)


def shape_as_dict(shape: Shape) -> dict[str, Any]:
    """Give plain data for a plan's file.

    Args:
        shape: A registered shape.

    Returns:
        Its kind and its fields; shapes among these are plain data too.
    """
    values = {field.name: getattr(shape, field.name) for field in fields(shape)}  # type: ignore[arg-type]
    return {"kind": shape.kind} | {k: shape_as_dict(v) if hasattr(v, "kind") else v for k, v in values.items()}


def shape_from_dict(data: Mapping[str, Any]) -> Shape:
    """Rebuild a shape from `shape_as_dict`.

    Args:
        data: Plain data.

    Returns:
        The shape.

    Raises:
        PlanError: the kind is unknown, or a field is missing, unknown, of the wrong type or impossible.
    """
    rest = {name: shape_from_dict(v) if isinstance(v, Mapping) else v for name, v in data.items() if name != "kind"}
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise PlanError(f"there is no shape {shortened(repr(kind))}.", found=", ".join(_KINDS))
    try:
        shape: Shape = TypeAdapter(_KINDS[kind]).validate_python(rest)
    except ValidationError as error:
        reason = error.errors()[0].get("ctx", {}).get("error")
        if isinstance(reason, PlanError):
            raise reason from error
        place, problem = first_problem(error)
        raise PlanError(f"{place} of shape {kind!r}: {problem}") from error
    return shape


@lru_cache(maxsize=1024)
def lora_shape(rank: int, alpha: float, *, num_experts: int = 1, top_k: int = 1, sparsity: float = 0.0) -> Shape:
    """Give the shape of LoRA experts: plain LoRA where there is one, sparse where entries of B are left out.

    Args:
        rank: Rank of every expert.
        alpha: Scale numerator.
        num_experts: LoRA experts.
        top_k: LoRA experts that a token uses.
        sparsity: Share of the entries of B that stay zero.

    Returns:
        The shape.

    Raises:
        PlanError: no adapter can have these numbers.
    """
    expert = Sparse(rank, alpha, sparsity) if sparsity else LowRank(rank, alpha)
    return expert if num_experts == 1 and top_k == 1 else Routed(expert, num_experts, top_k)
