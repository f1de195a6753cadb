"""The product of rows and a frozen matrix on a CPU, by the quicker of the two libraries that PyTorch has for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# PyTorch's float32 `mm` goes to MKL, which on AMD's processors runs at half of what oneDNN reaches. PyTorch offers
# oneDNN's float32 product to its compiler alone, by this operator; where a build lacks it, `mm` does.
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def multiply(rows_NI: Tensor, matrix_IO: Tensor, out_NO: Tensor, bias_O: Tensor | None = None) -> None:
    """Write the product of rows and a matrix, with its bias, where it belongs.

    Args:
        rows_NI: The rows.
        matrix_IO: The matrix, row by row or column by column.
        out_NO: Where the product goes.
        bias_O: What is added to each row.
    """
    if _ONEDNN is not None and rows_NI.dtype == torch.float32 and torch.backends.mkldnn.enabled:
        out_NO.copy_(_ONEDNN(rows_NI, matrix_IO.t(), bias_O, "none", [], ""))
    elif bias_O is None:
        torch.mm(rows_NI, matrix_IO, out=out_NO)
    else:
        torch.addmm(bias_O, rows_NI, matrix_IO, out=out_NO)
