"""Products with a layer's experts and their low-rank terms, forward and backward, a few experts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apportion.adapters.kernels.cpu.chunks import Chunk
from apportion.adapters.kernels.cpu.product import multiply
from apportion.adapters.kernels.cpu.saved import Gradients, SavedProducts, TermFactors
from apportion.adapters.kernels.cpu.sorted_rows import SortedRows

# Shapes: C rows of a chunk, B experts of a chunk, n rows of each in a batch, E experts, G of a term's experts that have
# rows, r rank per expert when padded, I and O a parameter's input and output width.


class PaddedFactors(NamedTuple):
    """One term's factors of the experts that have rows; B is multiplied by the scale."""

    a_GrI: Tensor
    b_GrO: Tensor


class TermOnChunk(NamedTuple):
    """A term that stands on a chunk: its number, its columns of the output, the chunk's experts among its own."""

    number: int
    columns: slice
    experts: slice


class _Pass:
    """What both directions of a pass have: the factors of the experts that have rows, and masks.

    Args:
        rows: The rows and their experts.
        factors: Every term's factors.
        saved: What the backward pass needs; None where there is none.
    """

    def __init__(self, rows: SortedRows, factors: Sequence[TermFactors], saved: SavedProducts | None) -> None:
        self.rows, self.saved = rows, saved
        self.masks = rows.draw_masks() if saved is None else saved.masks
        self.factors: list[PaddedFactors] = []
        for order, (_, term), term_factors in zip(rows.orders, rows.terms, factors, strict=True):
            planned, b_RO = term.planned, term_factors.dense_b(term)
            a_GrI = planned.padded(term_factors.a_RI).index_select(0, order)
            b_GrO = planned.padded(b_RO * planned.scale(b_RO)).index_select(0, order)
            self.factors.append(PaddedFactors(a_GrI, b_GrO))

    def terms(self, parameter: str, chunk: Chunk) -> list[TermOnChunk]:
        """Return the terms of a parameter that stand on a chunk."""
        return [
            TermOnChunk(number, self.rows.terms[number].term.columns, experts)
            for number, experts in chunk.terms.items()
            if self.rows.terms[number].parameter == parameter
        ]

    def dropped(self, parameter: str, x_CI: Tensor, chunk: Chunk) -> Tensor:
        """Return what the terms of a parameter multiply."""
        mask_MI = self.masks.get(parameter)
        return x_CI if mask_MI is None else (x_CI * mask_MI[chunk.window]).div_(1 - self.rows.routed.dropout)


class ForwardPass(_Pass):
    """Products from inputs to outputs.

    Args:
        rows: The rows and their experts.
        factors: Every term's factors.
        saved: What the backward pass needs; None where there is none.
    """

    def __init__(self, rows: SortedRows, factors: Sequence[TermFactors], saved: SavedProducts | None) -> None:
        super().__init__(rows, factors, saved)
        self.matrices = {
            name: frozen.by_expert(len(rows.present), turned=True) for name, frozen in rows.matrices.items()
        }

    def multiply(self, parameter: str, x_CI: Tensor, chunk: Chunk, out_CO: Tensor) -> None:
        """Multiply a chunk's rows by one parameter, with its bias and its terms, into `out_CO`."""
        expert_matrix, bias_EO = self.matrices[parameter], self.rows.biases[parameter]
        for expert, x_nI, out_nO in zip(chunk.experts, chunk.cut(x_CI), chunk.cut(out_CO), strict=True):
            multiply(x_nI, expert_matrix(expert), out_nO, None if bias_EO is None else bias_EO[expert])
        terms = self.terms(parameter, chunk)
        if not terms:
            return
        x_BnI, out_BnO = chunk.batch(self.dropped(parameter, x_CI, chunk)), chunk.batch(out_CO)
        for number, columns, experts in terms:
            a_GrI, b_GrO = self.factors[number]
            a_BrI, b_BrO = a_GrI[experts], b_GrO[experts]
            if a_BrI.dtype != x_BnI.dtype:  # where nothing is saved
                code_Bnr = torch.bmm(x_BnI.to(a_BrI.dtype), a_BrI.transpose(1, 2))
                out_BnO[..., columns].add_(torch.bmm(code_Bnr, b_BrO))
                continue
            code_Bnr = torch.bmm(x_BnI, a_BrI.transpose(1, 2))
            out_BnO[..., columns].baddbmm_(code_Bnr, b_BrO)
            if self.saved is not None:
                self.saved.codes[chunk.start, number] = code_Bnr


class BackwardPass(_Pass):
    """Products from the gradients of outputs to those of inputs and factors.

    Args:
        rows: The rows and their experts.
        factors: Every term's factors.
        saved: What the forward pass saved.
        gradients: What is to be filled in.
    """

    def __init__(
        self, rows: SortedRows, factors: Sequence[TermFactors], saved: SavedProducts, gradients: Gradients
    ) -> None:
        super().__init__(rows, factors, saved)
        self.matrices = {name: frozen.by_expert(len(rows.present)) for name, frozen in rows.matrices.items()}
        self.entered, self.codes, self.gradients = saved.entered, saved.codes, gradients

    def multiply(
        self,
        parameter: str,
        grad_CO: Tensor,
        x_CI: Tensor | None,
        chunk: Chunk,
        grad_x_CI: Tensor | None,
        *,
        weights_C1: Tensor | None = None,
        add: bool = False,
    ) -> None:
        """Take a chunk's gradient back through one parameter and its terms, into `grad_x_CI`.

        The inputs may be missing where no term stands on the chunk. Where the rows' weights are passed, the gradient is
        that before weighting: so it leaves by `grad_x_CI`, and the factors' gradients are weighted.
        """
        if grad_x_CI is not None:
            self._through_parameter(parameter, grad_CO, chunk, grad_x_CI, add=add)
        terms = self.terms(parameter, chunk)
        if x_CI is None or not terms:
            return
        mask_MI = self.masks.get(parameter)
        x_BnI, grad_BnO = chunk.batch(self.dropped(parameter, x_CI, chunk)), chunk.batch(grad_CO)
        grad_x_BnI = None if grad_x_CI is None else chunk.batch(grad_x_CI)
        weights_Bn1 = None if weights_C1 is None else chunk.batch(weights_C1.to(grad_CO.dtype))
        for number, columns, experts in terms:
            a_GrI, b_GrO = self.factors[number]
            a_BrI, grad_out_BnO = a_GrI[experts], grad_BnO[..., columns]
            code_Bnr = self.codes[chunk.start, number]
            grad_code_Bnr = torch.bmm(grad_out_BnO, b_GrO[experts].transpose(1, 2))
            if grad_x_BnI is not None and mask_MI is None:
                grad_x_BnI.baddbmm_(grad_code_Bnr, a_BrI)
            elif grad_x_BnI is not None and mask_MI is not None:
                masked_BnI = torch.bmm(grad_code_Bnr, a_BrI).mul_(chunk.batch(mask_MI[chunk.window]))
                grad_x_BnI.add_(masked_BnI, alpha=1 / (1 - self.rows.routed.dropout))
            if weights_Bn1 is not None:
                code_Bnr, grad_code_Bnr = code_Bnr * weights_Bn1, grad_code_Bnr.mul_(weights_Bn1)
            grad_a_GrI, grad_b_GrO = self.gradients.terms[number]
            if grad_b_GrO is not None:
                torch.bmm(code_Bnr.transpose(1, 2), grad_out_BnO, out=grad_b_GrO[experts])
            if grad_a_GrI is not None:
                torch.bmm(grad_code_Bnr.transpose(1, 2), x_BnI, out=grad_a_GrI[experts])

    def _through_parameter(
        self, parameter: str, grad_CO: Tensor, chunk: Chunk, grad_x_CI: Tensor, *, add: bool
    ) -> None:
        """Take a chunk's gradient back through the parameter itself."""
        expert_matrix = self.matrices[parameter]
        for expert, grad_nO, grad_x_nI in zip(chunk.experts, chunk.cut(grad_CO), chunk.cut(grad_x_CI), strict=True):
            product_nI = torch.empty_like(grad_x_nI) if add else grad_x_nI
            multiply(grad_nO, expert_matrix(expert), product_nI)
            if add:
                grad_x_nI.add_(product_nI)
