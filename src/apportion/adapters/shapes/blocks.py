"""The shape `blocks`: several small LoRAs, each on its slice of the input and of the output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apportion.adapters.factors import NOT_STARTED
from apportion.adapters.shapes.base import Draw, LoraPair, Place, Shape

# Shapes: T tokens (over any leading dimensions), n blocks, I and O input and output width, i and o those of a block,
# r rank of a block, R = n·r. On stacked experts, tensors have one more dimension in front.


class Blocks(Shape):
    """``scale · B A`` with block-diagonal factors, of which only the blocks are held.

    Args:
        place: The matrix, or the stacked matrices. The number of blocks divides both widths.
        rank: Rank of each block.
        scale: alpha / rank.
        blocks: Number of blocks.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, place: Place, rank: int, scale: float, blocks: int) -> None:
        super().__init__()
        self.scale = scale
        for name, size, value in (
            ("lora_A", (rank, place.in_features // blocks), NOT_STARTED),
            ("lora_B", (place.out_features // blocks, rank), 0.0),
        ):
            tensor = torch.full((*place.copies, blocks, *size), value, device=place.device, dtype=place.dtype)
            self.register_parameter(name, nn.Parameter(tensor))

    def as_lora(self) -> LoraPair | None:
        """Return the block-diagonal factors, with zeros outside the blocks."""
        return LoraPair(_block_diagonal(self.lora_A), _block_diagonal(self.lora_B), self.scale)

    def delta(self, x_TI: Tensor) -> Tensor:
        """Multiply each slice by its block."""
        num_blocks = len(self.lora_A)
        if num_blocks == 1:  # plain LoRA, which these products equal but for rounding
            return super().delta(x_TI)
        x_Tni = x_TI.reshape(*x_TI.shape[:-1], num_blocks, -1)
        code_Tnr = torch.einsum("...ni,nri->...nr", x_Tni, self.lora_A)
        return torch.einsum("...nr,nor->...no", code_Tnr, self.lora_B).flatten(-2) * self.scale

    def start(self, draw: Draw) -> None:
        """Draw A; B is zero."""
        draw(self.lora_A)


def _block_diagonal(blocks: Tensor) -> Tensor:
    """Place blocks of shape (..., n, rows, columns) on the diagonal of a matrix, zeros elsewhere."""
    num_blocks = blocks.shape[-3]
    is_diagonal = torch.eye(num_blocks, dtype=torch.bool, device=blocks.device)[:, None, :, None]
    spread = torch.where(is_diagonal, blocks.unsqueeze(-2), blocks.new_zeros(()))
    return spread.flatten(-4, -3).flatten(-2)
