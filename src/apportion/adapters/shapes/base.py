"""What every shape of adapter answers, whatever hosts it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from apportion.adapters.factors import SparseFactor

# Shapes: T tokens (over any leading dimensions), I and O input and output width of a matrix, R rank of the LoRA that
# equals a shape. Where a shape is on stacked experts, all its tensors have one more dimension in front.

Tensors = dict[str, Tensor]  # by their names in a shape
Size = tuple[int, ...]


class Place(NamedTuple):
    """The matrix that an adapter is for, or the stacked matrices of one size.

    Args:
        out_features: Output width.
        in_features: Input width.
        device: Where the adapter's tensors live.
        dtype: Type of those that train.
        copies: ``(experts,)`` for a stack of matrices, else empty. All of the adapter's tensors begin with it.
    """

    out_features: int
    in_features: int
    device: torch.device
    dtype: torch.dtype
    copies: tuple[int, ...] = ()


class LoraPair(NamedTuple):
    """The LoRA that equals an adapter: ``scale · b a``.

    Args:
        a_RI: Shape (..., R, I).
        b_OR: Shape (..., O, R).
        scale: Its scale.
    """

    a_RI: Tensor
    b_OR: Tensor
    scale: float


class SiteFactors(NamedTuple):
    """A and B of one site, without scale and gates. Dense ones are views: writing to them changes the adapter.

    Args:
        site: The site's name behind that of the host: empty, or ``.5.gate_proj``.
        a_RI: Shape (R, I).
        b_OR: Shape (O, R).
    """

    site: str
    a_RI: Tensor
    b_OR: Tensor


class Draw(Protocol):
    """Draws a tensor's initial values, Kaiming-uniform with the bound 1 / sqrt(last dimension)."""

    def __call__(self, tensor: Tensor, name: str = "") -> None:
        """Fill a tensor in place from a generator of its own.

        Args:
            tensor: The tensor.
            name: What the generator is named by, behind the site's name; empty for the first factor.
        """


class Adapter(nn.Module, ABC):
    """The tensors of one adapter in one host: a `Shape` on one matrix, or the shapes on a layer's experts."""

    is_gated: ClassVar[bool] = False  # whether gates depend on the input, so that no weight equals the adapter

    @abstractmethod
    def start(self, draw: Draw) -> None:
        """Draw the initial values of the tensors that do not start at zero.

        Args:
            draw: Draws one tensor.
        """

    @abstractmethod
    def factors(self) -> Iterator[SiteFactors]:
        """Iterate over the sites' factors."""

    @abstractmethod
    def sites(self) -> list[str]:
        """Return the names of the sites behind that of the host."""

    @abstractmethod
    def split(self, state: Tensors) -> dict[str, Tensors]:
        """Cut the module's state into the tensors of a checkpoint, by site."""

    @abstractmethod
    def join(self, files: Mapping[str, Tensors]) -> Tensors:
        """Undo `split`."""

    def keep(self, kept: Mapping[str, Tensor]) -> None:
        """Keep other entries of every sparse B, all of them zero.

        Args:
            kept: Positions in B laid out row by row, by site.
        """
        for module in self.children():
            if isinstance(module, SparseFactor):
                module.keep(kept[""])


class Shape(Adapter):
    """One adapter on one matrix, or equally on each of several stacked matrices of one size.

    A subclass holds its tensors directly, or in a factor's module. Their names, such as ``lora_A`` or
    ``lora_A.weight``, begin with ``lora_``, and are those in a checkpoint, behind the site's name. Except for gated
    shapes, it must run with one more dimension in front of every tensor, so that stacked experts can have it.
    """

    @abstractmethod
    def as_lora(self) -> LoraPair | None:
        """Return the LoRA that equals the adapter; gradients reach the adapter's tensors through it.

        Returns:
            The pair; None if gates depend on the input.
        """

    def forward(self, x_TI: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what the adapter adds to a layer's output.

        Args:
            x_TI: The layer's input.
            drop: Dropout, which gates do not get.

        Returns:
            Shape (..., O), in the type of the factors.
        """
        return self.delta(drop(x_TI.to(self.dtype)))

    def delta(self, x_TI: Tensor) -> Tensor:
        """Return the adapter's output, by the products of PEFT's own LoRA layers, which round alike.

        Args:
            x_TI: Its input, in the type of the factors.

        Returns:
            Shape (..., O).
        """
        a_RI, b_OR, scale = self.lora_pair()
        return functional.linear(functional.linear(x_TI, a_RI), b_OR) * scale

    def weight_delta(self) -> Tensor:
        """Return what the adapter adds to the matrix, shape (..., O, I)."""
        a_RI, b_OR, scale = self.lora_pair()
        return (b_OR @ a_RI) * scale

    @property
    def dtype(self) -> torch.dtype:
        """Type of the factors."""
        return next(tensor for tensor in (*self.parameters(), *self.buffers()) if tensor.is_floating_point()).dtype

    def factors(self) -> Iterator[SiteFactors]:
        """Return the factors of the LoRA that equals the adapter."""
        a_RI, b_OR, _ = self.lora_pair()
        yield SiteFactors("", a_RI.detach(), b_OR.detach())

    def sites(self) -> list[str]:
        """Return the name of the only site: the host's."""
        return [""]

    def sizes(self) -> dict[str, Size | None]:
        """Return the sizes of the tensors in a checkpoint by name. None where only some entries are kept."""
        sizes: dict[str, Size | None] = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        for path, module in self.named_modules():
            if isinstance(module, SparseFactor):
                sizes |= {f"{path}.values": None, f"{path}.indices": None}
        return sizes

    def split(self, state: Tensors) -> dict[str, Tensors]:
        """Return the state as it is."""
        return {"": state}

    def join(self, files: Mapping[str, Tensors]) -> Tensors:
        """Return the only site's tensors."""
        return files[""]

    def lora_pair(self) -> LoraPair:
        """Return the LoRA that equals the adapter, of a shape that has one.

        Returns:
            The pair.

        Raises:
            TypeError: gates depend on the input.
        """
        pair = self.as_lora()
        if pair is None:
            raise TypeError(f"{type(self).__name__} equals no LoRA.")
        return pair
