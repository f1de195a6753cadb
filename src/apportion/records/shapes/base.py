"""`Shape`: the form of one adapter as plain data, and its tensors at a site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from pydantic import ConfigDict

from apportion.errors import PlanError
from apportion.records.numbers import AnyFloat, WholeNumber

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

    def check(self, in_features: int, out_features: int) -> None:
        """Check that a matrix can have the adapter.

        Args:
            in_features: Input width of the matrix.
            out_features: Output width of the matrix.

        Raises:
            PlanError: it cannot.
        """

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
class ScaledFactors:
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

    def check(self, in_features: int, out_features: int) -> None:
        """Accept every matrix."""

    def flops(self, in_features: int, out_features: int) -> int:
        """Count the operations per token. Sparse factors are multiplied as dense ones."""
        return 2 * self.rank * (in_features + out_features)
