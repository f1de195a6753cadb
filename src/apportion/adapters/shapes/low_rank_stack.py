"""Low-rank shapes of stacked experts in one parameter per projection and factor, as the kernels run them fastest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apportion.adapters.factors import NOT_STARTED, FrozenFactor, SparseFactor, matrix_of
from apportion.adapters.kernels.terms import LowRankTerm
from apportion.adapters.shapes.base import Draw, Place, Tensors
from apportion.adapters.shapes.experts import Stack, site_of
from apportion.adapters.shapes.sparse import SparseOptions, no_entries
from apportion.adapters.specs import ExpertFactors

# Shapes: I and O a projection's input and output width, R summed rank of its planned experts, r rank of one, k kept
# entries.


class LowRankStack(Stack):
    """Low-rank shapes, of any rank per expert, and sparse ones.

    ``lora_A[projection]`` has shape (R, I) and ``lora_B[projection]`` (R, O), expert after expert in rising order. The
    checkpoint holds them expert by expert, in PEFT's shapes.

    Args:
        planned: The experts of each projection, their ranks and scales.
        a: Every projection's A.
        b: Every projection's B.
    """

    def __init__(self, planned: Mapping[str, ExpertFactors], a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
        super().__init__(planned)
        self.lora_A: Any = _container(a)
        self.lora_B: Any = _container(b)

    def term(self, projection: str, columns: slice) -> LowRankTerm:
        """Return the factors as they are."""
        a_RI, b = matrix_of(self.lora_A[projection]), self.lora_B[projection]
        return LowRankTerm(a_RI, b, self.planned[projection], columns)

    def keep(self, kept: Mapping[str, Tensor]) -> None:
        """Keep other entries of every sparse B, all of them zero.

        Args:
            kept: Each site's kept entries, laid out row by row (out, rank).
        """
        for projection, planned in self.planned.items():
            sparse = self.lora_B[projection]
            if not isinstance(sparse, SparseFactor):
                continue
            of_experts = [kept[site_of(expert, projection)].to(sparse.indices.device) for expert in planned.experts]
            sparse.keep(_stacked_indices(planned, of_experts, sparse.shape[1]))

    def start(self, draw: Draw) -> None:
        """Draw each expert's A."""
        for projection, planned in self.planned.items():
            for expert, a_rI in planned.by_expert(matrix_of(self.lora_A[projection])).items():
                draw(a_rI, site_of(expert, projection))

    def split(self, state: Tensors) -> dict[str, Tensors]:
        """Cut the factors into the experts'."""
        files: dict[str, Tensors] = {}
        for projection, planned in self.planned.items():
            a_name, b_name = f"lora_A.{projection}", f"lora_B.{projection}"
            for name, parts in {
                "lora_A.weight": _rows(planned, state.get(a_name, state.get(f"{a_name}.weight"))),
                "lora_B.weight": [part.t() for part in _rows(planned, state.get(b_name))],
                "lora_B.values": [],
                "lora_B.indices": [],
            }.items():
                for expert, part in zip(planned.experts, parts, strict=False):
                    files.setdefault(site_of(expert, projection), {})[name] = part.contiguous().clone()
            if f"{b_name}.values" in state:
                width_out = self.lora_B[projection].shape[1]
                entries = _entries(planned, state[f"{b_name}.values"], state[f"{b_name}.indices"], width_out)
                for expert, (values_k, indices_k) in zip(planned.experts, entries, strict=True):
                    sparse = {"lora_B.values": values_k, "lora_B.indices": indices_k}
                    files.setdefault(site_of(expert, projection), {}).update(sparse)
        return files

    def join(self, files: Mapping[str, Tensors]) -> Tensors:
        """Stack the experts' factors."""
        state: Tensors = {}
        for projection, planned in self.planned.items():
            of_experts = [files[site_of(expert, projection)] for expert in planned.experts]
            a_name, b_name = f"lora_A.{projection}", f"lora_B.{projection}"
            if "lora_A.weight" in of_experts[0]:
                name = f"{a_name}.weight" if isinstance(self.lora_A[projection], FrozenFactor) else a_name
                state[name] = torch.cat([tensors["lora_A.weight"] for tensors in of_experts])
            if "lora_B.weight" in of_experts[0]:
                state[b_name] = torch.cat([tensors["lora_B.weight"].t() for tensors in of_experts])
            if "lora_B.values" in of_experts[0]:
                indices = [tensors["lora_B.indices"] for tensors in of_experts]
                width_out = self.lora_B[projection].shape[1]
                state[f"{b_name}.values"] = torch.cat([tensors["lora_B.values"] for tensors in of_experts])
                state[f"{b_name}.indices"] = _stacked_indices(planned, indices, width_out).to(torch.int32)
        return state


def low_rank_stack(planned: Mapping[str, ExpertFactors], places: Mapping[str, Place]) -> LowRankStack:
    """Make low-rank shapes of some experts.

    Args:
        planned: The experts of each projection, their ranks and scales.
        places: One expert's matrix of each projection.

    Returns:
        The stack; every A is not started, every B is zero.
    """
    a, b = {}, {}
    for name, factors in planned.items():
        place, rank = places[name], sum(factors.ranks)
        a[name] = _parameter((rank, place.in_features), place, NOT_STARTED)
        b[name] = _parameter((rank, place.out_features), place, 0.0)
    return LowRankStack(planned, a, b)


def sparse_stack(
    planned: Mapping[str, ExpertFactors], places: Mapping[str, Place], options: SparseOptions
) -> LowRankStack:
    """Make sparse shapes of some experts.

    Args:
        planned: The experts of each projection, their ranks and scales.
        places: One expert's matrix of each projection.
        options: Whether B is dense, and whether checkpoints hold A.

    Returns:
        The stack; every A is not started, and no entry of a B is kept.
    """
    a: dict[str, Any] = {}
    b: dict[str, Any] = {}
    for name, factors in planned.items():
        place, rank = places[name], sum(factors.ranks)
        a[name] = FrozenFactor(rank, place.in_features, place.device, stored=options.stored_a)
        if options.dense_b:
            b[name] = _parameter((rank, place.out_features), place, 0.0)
        else:
            b[name] = SparseFactor(rank, place.out_features, no_entries(place.device), place.device)
    return LowRankStack(planned, a, b)


def _parameter(size: tuple[int, int], place: Place, value: float) -> nn.Parameter:
    """Make a parameter with one value."""
    return nn.Parameter(torch.full(size, value, device=place.device, dtype=place.dtype))


def _container(made: Mapping[str, Any]) -> nn.Module:
    """Hold parameters or modules by projection."""
    is_plain = all(isinstance(factor, nn.Parameter) for factor in made.values())
    return nn.ParameterDict(made) if is_plain else nn.ModuleDict(made)


def _rows(planned: ExpertFactors, stacked_RW: Tensor | None) -> list[Tensor]:
    """Cut a stacked factor into the experts' rows; an empty list if there is none."""
    return [] if stacked_RW is None else list(torch.split(stacked_RW, list(planned.ranks)))


def _starts(planned: ExpertFactors) -> list[int]:
    """Return each expert's first row."""
    return [sum(planned.ranks[:number]) for number in range(len(planned.ranks))]


def _stacked_indices(planned: ExpertFactors, of_experts: list[Tensor], width_out: int) -> Tensor:
    """Return where the experts' kept entries, laid out (out, rank), are in the stacked factor of shape (R, O)."""
    columns = zip(_starts(planned), planned.ranks, of_experts, strict=True)
    return torch.cat([(start + i.long() % rank) * width_out + i.long() // rank for start, rank, i in columns])


def _entries(
    planned: ExpertFactors, values_k: Tensor, indices_k: Tensor, width_out: int
) -> list[tuple[Tensor, Tensor]]:
    """Undo `_stacked_indices`, and cut the values too."""
    rows_k, columns_k = indices_k.long() // width_out, indices_k.long() % width_out
    starts_H = torch.tensor(_starts(planned), device=rows_k.device)
    expert_k = torch.bucketize(rows_k, starts_H, right=True) - 1
    ranks_H = torch.tensor(planned.ranks, device=rows_k.device)
    local_k = (columns_k * ranks_H[expert_k] + rows_k - starts_H[expert_k]).to(torch.int32)
    counts = torch.bincount(expert_k, minlength=len(planned.ranks)).tolist()
    return list(zip(torch.split(values_k, counts), torch.split(local_k, counts), strict=True))
