"""`Shape`: the form of one adapter as plain data, and its tensors at a site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

from pydantic import ConfigDict, TypeAdapter, ValidationError

from apportion.errors import PlanError, shortened
from apportion.records.numbers import AnyFloat, WholeNumber, first_problem

MAX_WIDTH = 65_536  # total rank of a site's LoRA experts; larger than any matrix of a known model
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**127  # limits of float32, the dtype of adapters


class Part(NamedTuple):
    """One tensor of an adapter.

    Args:
        entries: Number of entries, kept or not.
        trains: Whether the tensor is trained. Other tensors are drawn from a seed.
        keep_frac: Share of the entries that are kept. Rounded up once over all sites with the same share.
        shared: Name of the tensor if several sites share it.
    """

    entries: int
    trains: bool = True
    keep_frac: float = 1.0
    shared: str | None = None


class Shape(Protocol):
    """The form of one adapter: its tensors and its cost on a matrix, independent of any model.

    A shape is a frozen dataclass whose fields are plain data or shapes. Use `register` to support it in plan files.
    """

    kind: ClassVar[str]

    def __hash__(self) -> int:
        """Hash the fields. Equal shapes are counted and saved together."""

    @property
    def rank(self) -> int:
        """Rank of the factors (of each LoRA expert, if there are several)."""

    @property
    def alpha(self) -> float:
        """Scale numerator: the adapter's output is multiplied by alpha / rank."""

    @property
    def lora_rank(self) -> int | None:
        """Rank of the equivalent plain LoRA; None if gates depend on the input."""

    def parts(self, in_features: int, out_features: int) -> Iterator[Part]:
        """Return the adapter's tensors on a matrix.

        Args:
            in_features: Input width of the matrix.
            out_features: Output width of the matrix.

        Returns:
            The tensors.
        """

    def flops(self, in_features: int, out_features: int) -> int:
        """Count the operations of the adapter per token that uses it. A multiply-add counts as two.

        Args:
            in_features: Input width of the matrix.
            out_features: Output width of the matrix.

        Returns:
            Operations of the forward pass.
        """


@dataclass(frozen=True)
class _Factors:
    """Two low-rank factors and a scale."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    rank: WholeNumber
    alpha: AnyFloat

    def __post_init__(self) -> None:
        """Check the fields."""
        if not 1 <= self.rank <= MAX_WIDTH:
            raise PlanError(f"an adapter has rank {self.rank}.", fix=f"give an integer from 1 to {MAX_WIDTH}")
        if not SMALLEST_SCALE <= self.alpha / self.rank <= LARGEST_SCALE:
            raise PlanError(
                f"an adapter has alpha {self.alpha} and rank {self.rank}: float32 cannot hold the scale alpha / rank.",
                fix="give an alpha near the rank, such as twice the rank",
            )

    @property
    def lora_rank(self) -> int:
        """Rank of the equivalent plain LoRA."""
        return self.rank

    def flops(self, in_features: int, out_features: int) -> int:
        """Count the operations per token. Sparse factors are multiplied as dense ones."""
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
        """Return A of shape (rank, in) and B of shape (out, rank)."""
        yield Part(self.rank * in_features)
        yield Part(self.rank * out_features)


@dataclass(frozen=True)
class Sparse(_Factors):
    """LoRI: a frozen random A and a sparse B.

    Args:
        rank: Rank of the factors.
        alpha: Scale numerator.
        sparsity: Share of the entries of B that are zero, above 0 and below 1.

    Source: LoRI, arXiv:2504.07448.
    """

    kind: ClassVar[str] = "sparse"

    sparsity: AnyFloat

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if not 0 < self.sparsity < 1:
            raise PlanError(f"an adapter has sparsity {self.sparsity}.", fix="give a share above 0 and below 1")

    def parts(self, in_features: int, out_features: int) -> Iterator[Part]:
        """Return the frozen A and the kept entries of B."""
        yield Part(self.rank * in_features, trains=False)
        yield Part(self.rank * out_features, keep_frac=1 - self.sparsity)


@dataclass(frozen=True)
class Routed:
    """LoRA-SMoE: several LoRA experts of one shape, and a linear router that weights them per token.

    Args:
        expert: Shape of each LoRA expert.
        num_experts: Number of LoRA experts, at least 2.
        top_k: LoRA experts used per token.

    Source: LoRA-SMoE, arXiv:2505.06272.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: ClassVar[str] = "routed"

    expert: LowRank | Sparse
    num_experts: WholeNumber
    top_k: WholeNumber

    def __post_init__(self) -> None:
        """Check the fields."""
        if not 1 <= self.top_k <= self.num_experts:
            raise PlanError(
                f"an adapter has {self.num_experts} LoRA experts and cannot use {self.top_k} of them per token.",
                fix="give a top_k from 1 to the number of LoRA experts",
            )
        if self.num_experts < 2 or self.num_experts * self.expert.rank > MAX_WIDTH:
            raise PlanError(
                f"an adapter has {self.num_experts} LoRA experts of rank {self.expert.rank}.",
                fix=f"give at least 2 experts, with experts times rank at most {MAX_WIDTH}",
            )

    @property
    def rank(self) -> int:
        """Rank of each LoRA expert."""
        return self.expert.rank

    @property
    def alpha(self) -> float:
        """Scale numerator of each LoRA expert."""
        return self.expert.alpha

    @property
    def lora_rank(self) -> None:
        """None: gates depend on the input, so no plain LoRA is equivalent."""
        return

    def parts(self, in_features: int, out_features: int) -> Iterator[Part]:
        """Return the stacked factors of the experts, and the router of shape (experts, in)."""
        for part in self.expert.parts(in_features, out_features):
            yield part._replace(entries=self.num_experts * part.entries)
        yield Part(self.num_experts * in_features)

    def flops(self, in_features: int, out_features: int) -> int:
        """Count the operations per token. All experts are computed, in one product."""
        return self.num_experts * (self.expert.flops(in_features, out_features) + 2 * in_features)


_KINDS: dict[str, type[Any]] = {}


def register(shape: type[Any]) -> type[Any]:
    """Register a shape, so that plan files can contain it.

    Args:
        shape: A frozen dataclass with a ``kind`` that follows `Shape`.

    Returns:
        The same class, for use as a decorator.

    Raises:
        ValueError: another shape with the same kind is registered.
    """
    if _KINDS.setdefault(shape.kind, shape) is not shape:
        raise ValueError(f"a shape {shape.kind!r} is already registered.")
    return shape


for _shape in (LowRank, Sparse, Routed):
    register(_shape)


def shape_as_dict(shape: Shape) -> dict[str, Any]:
    """Convert a shape to plain data.

    Args:
        shape: A registered shape.

    Returns:
        Its kind and its fields; nested shapes are converted too.
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
        PlanError: the kind is unknown, or a field is missing, unknown, of the wrong type or out of range.
    """
    rest = {name: shape_from_dict(v) if isinstance(v, Mapping) else v for name, v in data.items() if name != "kind"}
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise PlanError(f"unknown shape {shortened(repr(kind))}.", expected=", ".join(_KINDS))
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
    """Return the shape of plain, sparse or routed LoRA.

    Args:
        rank: Rank of each LoRA expert.
        alpha: Scale numerator.
        num_experts: Number of LoRA experts; 1 for plain LoRA.
        top_k: LoRA experts used per token.
        sparsity: Share of the entries of B that are zero; 0 for a dense B.

    Returns:
        The shape.

    Raises:
        PlanError: a value is out of range.
    """
    expert = Sparse(rank, alpha, sparsity) if sparsity else LowRank(rank, alpha)
    return expert if num_experts == 1 and top_k == 1 else Routed(expert, num_experts, top_k)
