"""Compare what was written with the adapter: read back and unfolded, every product must be the adapter's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from apportion.errors import OutputWriteError
from apportion.formats.factors import SavedAdapter
from apportion.formats.pairs import Pair, folded

_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # relative to the product's norm


def check_written(adapter: SavedAdapter, written: Iterable[Pair]) -> None:
    """Check that a file says the same as an adapter.

    Args:
        adapter: The adapter.
        written: The pairs read back from the file, without those that are all zeros.

    Raises:
        OutputWriteError: a site is missing or added, or its product is another one.
    """
    read = {pair.site.name: pair for pair in written}
    expected = {pair.site.name: pair for pair in folded(adapter)}
    names = [name for name, pair in expected.items() if pair.b_OR.any() and pair.a_RI.any()]
    wrong = sorted(read.keys() ^ set(names))
    wrong += [name for name in names if name in read and not _equal(read[name], expected[name])]
    if wrong:
        raise OutputWriteError(
            "what was written does not say what the adapter says; it was removed again.",
            place=wrong,
            fix="another --dtype if numbers are too large or too small for this one; otherwise report this",
        )


def _equal(written: Pair, expected: Pair) -> bool:
    """Return whether two pairs have the same product, up to rounding in the type of the file."""
    difference = Pair(
        expected.site,
        torch.cat([written.a_RI.double(), expected.a_RI.double()]),
        torch.cat([written.b_OR.double(), -expected.b_OR.double()], dim=1),
    )
    tolerance = max(_TOLERANCE[written.b_OR.dtype], _TOLERANCE[expected.b_OR.dtype])
    return bool(_norm(difference) <= tolerance * _norm(expected))  # False for NaN


def _norm(pair: Pair) -> Tensor:
    """Return the Frobenius norm of a product without building it."""
    a_RI, b_OR = pair.a_RI.double(), pair.b_OR.double()
    return ((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum().clamp(min=0).sqrt()
