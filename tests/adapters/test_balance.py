"""The balance loss of a layer with routed LoRA experts."""

from __future__ import annotations

import pytest
import torch

from apportion.adapters.balance import BalanceSums


def test_the_balance_loss_is_the_switch_form_over_real_tokens() -> None:
    sums = BalanceSums()
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    ids = torch.tensor([[0, 1], [1, 2], [2, 0]])
    sums.add(probabilities, ids)
    assert sums.loss is not None
    assert float(sums.loss) == pytest.approx(1.0)
    sums.real_T = torch.tensor([True, True, False])
    sums.add(probabilities, ids)
    shares, means = torch.tensor([1, 2, 1]) / 4, torch.tensor([0.4, 0.4, 0.2])
    assert float(sums.loss) == pytest.approx(3 * float((shares * means).sum()))
