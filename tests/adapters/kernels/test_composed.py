"""The composed kernel never waits for a GPU, and multiplies in the rows' type."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from adapted_experts import adapted_experts, routed_inputs
from apportion.experts.grouped import grouped_low_rank
from apportion.experts.run import run_experts


@pytest.mark.parametrize("every", [False, True], ids=["some", "every"])
def test_the_path_of_a_gpu_never_waits_for_it(every: bool) -> None:
    """Tensors without data refuse whatever would need their values on the host."""
    layer = adapted_experts("olmoe", torch.bfloat16, every=every)
    hidden, ids, weights = (tensor.detach().to("meta") for tensor in routed_inputs(layer, 32, torch.bfloat16))
    layer.to("meta")
    found = layer(hidden.requires_grad_(), ids, weights)
    found.sum().backward()
    assert hidden.grad.shape == found.shape == hidden.shape
    assert all(p.grad is not None for p in [*layer.lora_shape.parameters()])


def test_factors_kept_in_float32_multiply_rows_in_the_rows_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's grouped product takes bfloat16; in float32 it would wait for every expert's rows."""
    layer = adapted_experts("olmoe", torch.bfloat16)
    layer.lora_shape.float()
    seen: list[torch.dtype] = []

    def product(x: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        seen.extend((x.dtype, a.dtype, b.dtype))
        return grouped_low_rank(x, a, b, ends)

    monkeypatch.setattr("apportion.adapters.kernels.composed.grouped_low_rank", product)
    run_experts(
        layer.base_layer, *routed_inputs(layer, dtype=torch.bfloat16), partial(layer.adapted_product, ["default"])
    ).sum().backward()
    assert set(seen) == {torch.bfloat16}
    assert all(p.grad.dtype == torch.float32 for p in [*layer.lora_shape.parameters()])
