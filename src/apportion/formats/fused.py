"""PEFT's layout of adapters on stacked experts: one pair of factors for a whole parameter.

The rows of A are the experts' rows, one expert after the other. In B the expert varies fastest: column ``r * E + e``
belongs to rank r of expert e. Where gate and up share a parameter, an expert has the ranks of both, one after another,
and B has zeros where a rank of gate meets a row of up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apportion.errors import ConfigurationError
from apportion.experts.forms import ExpertForm, form_of
from apportion.formats.pairs import Pair, nonzero
from apportion.records.site import ExpertBlock, Site

# E experts, R a pair's rank (the same for all experts of a parameter), I and O the parameter's input and output width.


@dataclass(frozen=True)
class FusedParameter:
    """A stacked parameter, as PEFT adapts it.

    Args:
        module: Path of the experts module.
        name: The parameter's name.
        sites: Sites of every expert's projections in this parameter, by expert and projection.
        rows: Rows of each projection.
        out_features: Output width of the whole parameter.
        swapped: Whether PEFT takes the parameter's input for its output, since the module does not say that it is
            stored transposed.
    """

    module: str
    name: str
    sites: dict[tuple[int, str], Site]
    rows: dict[str, slice]
    out_features: int
    swapped: bool

    @property
    def path(self) -> str:
        """The parameter's path."""
        return f"{self.module}.{self.name}"

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return 1 + max(expert for expert, _ in self.sites)

    def own_rank(self, pairs: Iterable[Pair]) -> int:
        """Return the rank that the pairs need: the largest sum over one expert's projections."""
        ranks: dict[int | None, int] = {}
        for pair in pairs:
            ranks[pair.site.expert] = ranks.get(pair.site.expert, 0) + pair.a_RI.shape[0]
        return max(ranks.values())

    def zero(self, dtype: torch.dtype) -> Pair:
        """Return a pair of zeros for the first expert."""
        site = next(iter(self.sites.values()))
        a_RI, b_OR = torch.zeros(1, site.in_features, dtype=dtype), torch.zeros(site.out_features, 1, dtype=dtype)
        return Pair(site, a_RI, b_OR)

    def fuse(self, pairs: Iterable[Pair], rank: int) -> tuple[Tensor, Tensor]:
        """Put the pairs of experts and projections together.

        Args:
            pairs: Pairs of this parameter's sites; experts without one get zeros.
            rank: The rank of every expert, at least `own_rank`.

        Returns:
            The two matrices that PEFT calls ``lora_A`` and ``lora_B``.
        """
        pairs = list(pairs)
        first = pairs[0]
        a_ERI = torch.zeros(self.num_experts, rank, first.a_RI.shape[1], dtype=first.a_RI.dtype)
        b_ORE = torch.zeros(self.out_features, rank, self.num_experts, dtype=first.b_OR.dtype)
        used = [0] * self.num_experts
        projections = {site.name: projection for (_, projection), site in self.sites.items()}
        for site, a_RI, b_OR in pairs:
            expert = int(site.expert or 0)
            ranks = slice(used[expert], used[expert] + a_RI.shape[0])
            used[expert] = ranks.stop
            a_ERI[expert, ranks] = a_RI
            b_ORE[self.rows[projections[site.name]], ranks, expert] = b_OR
        if self.swapped:
            return b_ORE.permute(2, 1, 0).flatten(0, 1).contiguous(), a_ERI.permute(2, 1, 0).flatten(1).contiguous()
        return a_ERI.flatten(0, 1), b_ORE.flatten(1)

    def unfuse(self, a: Tensor, b: Tensor) -> Iterator[Pair]:
        """Take the pairs of experts and projections out of PEFT's two matrices.

        Args:
            a: ``lora_A``.
            b: ``lora_B``.

        Yields:
            The pairs with a product other than zero, without ranks that are zero.
        """
        a_ERI = a.view(self.num_experts, -1, a.shape[1])
        b_ORE = b.view(b.shape[0], -1, self.num_experts)
        if self.swapped:
            a_ERI, b_ORE = b_ORE.permute(2, 1, 0), a_ERI.permute(2, 1, 0)
        for (expert, projection), site in self.sites.items():
            yield from nonzero(Pair(site, a_ERI[expert], b_ORE[self.rows[projection], :, expert]))


def fused_parameters(module: nn.Module, block: ExpertBlock) -> list[FusedParameter]:
    """Describe the stacked parameters of a layer's experts.

    Args:
        module: The experts module, with weights or on the meta device.
        block: What the layout says of it.

    Returns:
        One entry per parameter, in the module's order, which is the order in which PEFT wraps them.

    Raises:
        ConfigurationError: the experts are not stacked in a way that PEFT adapts.
    """
    form = form_of(module)
    own = dict(module.named_parameters(recurse=False))
    if form is None or any(name not in own or own[name].ndim != 3 for name in form.parameters):
        raise ConfigurationError(
            f"PEFT has no form for adapters on some experts of {block.name} ({type(module).__name__}).",
            fix="merge the adapter into the model (apportion merge)",
        )
    return [_parameter(module, form, block, name) for name in own if name in form.parameters]


def _parameter(module: nn.Module, form: ExpertForm, block: ExpertBlock, name: str) -> FusedParameter:
    """Describe one stacked parameter."""
    inside = form.projections_in(name)
    suffixes = {projection.suffix: projection for projection in block.projections}
    transposed = any(stacked.transposed for stacked in inside.values())
    shape = module.get_parameter(name).shape
    return FusedParameter(
        module=block.name,
        name=name,
        sites={
            (expert, suffix): block.site(expert, suffixes[suffix])
            for expert in range(block.num_experts)
            for suffix in inside
        },
        rows={suffix: stacked.rows for suffix, stacked in inside.items()},
        out_features=shape[2 if transposed else 1],
        swapped=transposed and not getattr(module, "is_transposed", False),
    )
