"""Shapes on a layer's stacked experts: the low-rank terms that the kernels run, and each expert's tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import reduce
from itertools import chain

import torch
from torch import Tensor

from apportion.adapters.factors import matrix_of
from apportion.adapters.kernels.terms import LowRankTerm
from apportion.adapters.shapes.base import Adapter, Draw, Shape, SiteFactors, Tensors
from apportion.adapters.specs import ExpertFactors

# Shapes: H planned experts, I and O a projection's input and output width, r rank per expert, R their summed rank.


def site_of(expert: int, projection: str) -> str:
    """Return the name of an expert's site behind that of the experts module."""
    return f".{expert}.{projection}"


class Stack(Adapter):
    """Shapes of some experts' projections.

    Args:
        planned: The experts of each projection, with the ranks and scales of the LoRA that equals their shapes.
    """

    def __init__(self, planned: Mapping[str, ExpertFactors]) -> None:
        super().__init__()
        self.planned = dict(planned)

    @abstractmethod
    def term(self, projection: str, columns: slice) -> LowRankTerm:
        """Return what is added to a projection of the experts.

        Args:
            projection: A key of `planned`.
            columns: The projection's part of its parameter's output.

        Returns:
            The term; gradients reach the shapes' tensors through it.
        """

    def weight_deltas(self, projection: str) -> Iterator[tuple[int, Tensor]]:
        """Iterate over what is added to each expert's matrix of a projection, shape (O, I)."""
        term = self.term(projection, slice(None))
        a, b = (term.planned.by_expert(matrix_of(factor)) for factor in (term.a_RI, term.b_RO))
        for expert, scale in zip(term.planned.experts, term.planned.scales, strict=True):
            yield expert, (b[expert].t() @ a[expert]) * scale

    def sites(self) -> list[str]:
        """Return the experts' sites."""
        return [site_of(expert, name) for name, planned in self.planned.items() for expert in planned.experts]

    def factors(self) -> Iterator[SiteFactors]:
        """Iterate over the experts' factors."""
        for projection, planned in self.planned.items():
            term = self.term(projection, slice(None))
            a, b = (planned.by_expert(matrix_of(factor).detach()) for factor in (term.a_RI, term.b_RO))
            for expert in planned.experts:
                yield SiteFactors(site_of(expert, projection), a[expert], b[expert].t())


class ShapeStack(Stack):
    """One shape on some experts of one projection, each of its tensors stacked.

    Args:
        projection: The projection.
        experts: The experts, in rising order.
        shape: The shape, made for as many copies.
    """

    def __init__(self, projection: str, experts: tuple[int, ...], shape: Shape) -> None:
        a_HrI, _, scale = shape.lora_pair()
        num_experts, rank = a_HrI.shape[:2]
        super().__init__({projection: ExpertFactors(experts, (rank,) * num_experts, (scale,) * num_experts)})
        self.shape = shape

    def term(self, projection: str, columns: slice) -> LowRankTerm:
        """Return the term of the LoRA that equals the shape."""
        a_HrI, b_HOr, _ = self.shape.lora_pair()
        b_RO = b_HOr.transpose(1, 2).flatten(0, 1)
        return LowRankTerm(a_HrI.flatten(0, 1), b_RO, self.planned[projection], columns)

    def weight_deltas(self, projection: str) -> Iterator[tuple[int, Tensor]]:
        """Iterate over what the shape adds to each expert's matrix."""
        yield from zip(self.planned[projection].experts, self.shape.weight_delta(), strict=True)

    def start(self, draw: Draw) -> None:
        """Draw each expert's tensors."""

        def draw_stacked(tensor: Tensor, name: str = "") -> None:
            for site, part in zip(self.sites(), tensor, strict=True):
                draw(part, site + name)

        self.shape.start(draw_stacked)

    def split(self, state: Tensors) -> dict[str, Tensors]:
        """Cut the tensors into the experts'."""
        return {
            site: {name.removeprefix("shape."): tensor[number].clone() for name, tensor in state.items()}
            for number, site in enumerate(self.sites())
        }

    def join(self, files: Mapping[str, Tensors]) -> Tensors:
        """Stack the experts' tensors."""
        sites = self.sites()
        return {f"shape.{name}": torch.stack([files[site][name] for site in sites]) for name in files[sites[0]]}


class ExpertShapes(Adapter):
    """All shapes of one adapter on a layer's experts.

    Args:
        stacks: The stacks by name. No two of them have the same expert of a projection.
    """

    def __init__(self, stacks: Mapping[str, Stack]) -> None:
        super().__init__()
        self.names = tuple(stacks)
        for name, stack in stacks.items():
            self.add_module(name, stack)

    @property
    def stacks(self) -> list[Stack]:
        """The stacks."""
        return [child for child in self.children() if isinstance(child, Stack)]

    def term(self, projection: str, columns: slice) -> LowRankTerm | None:
        """Return what is added to a projection of the experts, or None if nothing is."""
        terms = [stack.term(projection, columns) for stack in self.stacks if projection in stack.planned]
        return terms[0] if len(terms) == 1 else _joined(terms) if terms else None

    def weight_deltas(self, projection: str) -> Iterator[tuple[int, Tensor]]:
        """Iterate over what is added to each planned expert's matrix of a projection."""
        return chain.from_iterable(
            stack.weight_deltas(projection) for stack in self.stacks if projection in stack.planned
        )

    def start(self, draw: Draw) -> None:
        """Draw every stack."""
        for stack in self.stacks:
            stack.start(draw)

    def factors(self) -> Iterator[SiteFactors]:
        """Iterate over the factors of every stack."""
        return chain.from_iterable(stack.factors() for stack in self.stacks)

    def keep(self, kept: Mapping[str, Tensor]) -> None:
        """Keep other entries in every stack.

        Args:
            kept: Positions in each site's B, laid out row by row (out, rank).
        """
        for stack in self.stacks:
            stack.keep(kept)

    def sites(self) -> list[str]:
        """Return the sites of every stack."""
        return list(chain.from_iterable(stack.sites() for stack in self.stacks))

    def split(self, state: Tensors) -> dict[str, Tensors]:
        """Cut every stack's tensors."""
        files: dict[str, Tensors] = {}
        for name, stack in zip(self.names, self.stacks, strict=True):
            files |= stack.split({key[len(name) + 1 :]: t for key, t in state.items() if key.startswith(f"{name}.")})
        return files

    def join(self, files: Mapping[str, Tensors]) -> Tensors:
        """Join every stack's tensors."""
        return {
            f"{name}.{key}": tensor
            for name, stack in zip(self.names, self.stacks, strict=True)
            for key, tensor in stack.join(files).items()
        }


def _joined(terms: list[LowRankTerm]) -> LowRankTerm:
    """Join terms of different experts of one projection, in rising order of the experts."""
    parts = [
        (expert, a_rI, b_rO, scale)
        for term in terms
        for expert, a_rI, b_rO, scale in zip(
            term.planned.experts,
            term.planned.by_expert(term.a_RI).values(),
            term.planned.by_expert(matrix_of(term.b_RO)).values(),
            term.planned.scales,
            strict=True,
        )
    ]
    experts, a, b, scales = zip(*sorted(parts, key=lambda part: part[0]), strict=True)
    dtype = reduce(torch.promote_types, [part.dtype for part in a])
    planned = ExpertFactors(experts, tuple(len(a_rI) for a_rI in a), scales)
    rows_a, rows_b = (torch.cat([part.to(dtype) for part in factor]) for factor in (a, b))
    return LowRankTerm(rows_a, rows_b, planned, terms[0].columns)
