"""Iterate over an adapter's factors, site by site, for every kind of module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apportion.adapters.factors import matrix_of
from apportion.adapters.hosts.experts import ExpertLora
from apportion.discovery import walk_modules


def site_factors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Iterate over an adapter's sites and factors.

    Args:
        model: The model with the adapter.
        adapter_name: The adapter.

    Yields:
        The site; its A, of shape (rank, in); its B, of shape (out, rank), both over all LoRA experts. For dense factors
        these are views, so writing to them changes the adapter.
    """
    for path, module, base in walk_modules(model):
        called: Any = module
        if called is base or adapter_name not in getattr(called, "lora_B", {}):
            continue
        a, b = called.lora_A[adapter_name], called.lora_B[adapter_name]
        if not isinstance(called, ExpertLora):
            yield path, matrix_of(a).detach(), matrix_of(b).detach()
            continue
        for name, factors in called.factors[adapter_name].items():
            parts_a = torch.split(matrix_of(a[name]).detach(), list(factors.ranks))
            parts_b = torch.split(matrix_of(b[name]).detach(), list(factors.ranks))
            for expert, a_RI, b_RO in zip(factors.experts, parts_a, parts_b, strict=True):
                yield f"{path}.{expert}.{name}", a_RI, b_RO.t()
