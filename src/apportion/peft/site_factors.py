"""Iterate over an adapter's factors, site by site, whatever hosts them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from apportion.peft.hosted import hosted


def site_factors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Iterate over an adapter's sites and factors.

    Args:
        model: The model with the adapter.
        adapter_name: The adapter.

    Yields:
        The site; its A, of shape (rank, in); its B, of shape (out, rank): of the LoRA that equals its shape, or over
        all LoRA experts. For dense factors these are views, so writing to them changes the adapter.
    """
    for path, adapter in hosted(model, adapter_name):
        for site, a_RI, b_OR in adapter.factors():
            yield path + site, a_RI, b_OR
