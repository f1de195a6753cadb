"""The product of rows and a frozen matrix on a CPU, by the quicker of the two libraries that PyTorch has for it."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.compat.torch import HAS_ONEDNN_PRODUCT, onednn_product

# PyTorch's float32 `mm` goes to MKL, which on AMD's processors runs at half of what oneDNN reaches. PyTorch offers
# oneDNN's float32 product to its compiler alone, by this operator; where a build lacks it, `mm` does.


def multiply(rows_NI: Tensor, matrix_IO: Tensor, out_NO: Tensor, bias_O: Tensor | None = None) -> None:
    """Write the product of rows and a matrix, with its bias, where it belongs.

    Args:
        rows_NI: The rows.
        matrix_IO: The matrix, row by row or column by column.
        out_NO: Where the product goes.
        bias_O: What is added to each row.
    """
    if HAS_ONEDNN_PRODUCT and rows_NI.dtype == torch.float32 and torch.backends.mkldnn.enabled:
        out_NO.copy_(onednn_product(rows_NI, matrix_IO.t(), bias_O))
    elif bias_O is None:
        torch.mm(rows_NI, matrix_IO, out=out_NO)
    else:
        torch.addmm(bias_O, rows_NI, matrix_IO, out=out_NO)
