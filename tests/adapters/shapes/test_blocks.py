"""Block-diagonal LoRA: equal to dense block-diagonal algebra, on one matrix and on stacked ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from apportion.adapters.shapes.base import Place
from apportion.adapters.shapes.blocks import Blocks
from apportion.adapters.shapes.low_rank import low_rank
from apportion.errors import PlanError
from apportion.peft.start import draw
from apportion.records.shapes.blocks import Blocks as Record
from apportion.records.shapes.registry import shape_as_dict, shape_from_dict

CPU = torch.device("cpu")


def _random(num_blocks: int, copies: tuple[int, ...] = ()) -> Blocks:
    shape = Blocks(Place(6, 12, CPU, torch.float64, copies), rank=2, scale=0.5, blocks=num_blocks)
    for parameter in shape.parameters():
        nn.init.normal_(parameter)
    return shape


def _dense(shape: Blocks) -> Tensor:
    """Write the blocks out one by one."""
    a, b = (torch.block_diag(*factor) for factor in (shape.lora_A, shape.lora_B))
    return 0.5 * b @ a


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 6])
def test_equals_dense_block_diagonal_lora(num_blocks: int) -> None:
    shape = _random(num_blocks)
    dense, x = _dense(shape), torch.randn(2, 5, 12, dtype=torch.float64)
    pair = shape.as_lora()
    assert pair is not None
    assert pair.a_RI.shape == (2 * num_blocks, 12)
    for delta in (shape.weight_delta(), pair.scale * pair.b_OR @ pair.a_RI):
        assert torch.allclose(delta, dense)
    assert torch.allclose(shape.delta(x), x @ dense.t())
    outside = torch.block_diag(*[torch.ones(6 // num_blocks, 12 // num_blocks)] * num_blocks) == 0
    assert not shape.weight_delta()[outside].any()
    assert torch.linalg.matrix_rank(shape.weight_delta()) == min(2 * num_blocks, 6)


def test_gradients_reach_the_blocks_through_every_answer() -> None:
    shape, x = _random(3), torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: shape.delta(x), (x, *shape.parameters()))
    assert torch.autograd.gradcheck(lambda *_: shape.as_lora()[:2], tuple(shape.parameters()))
    assert torch.autograd.gradcheck(lambda *_: shape.weight_delta(), tuple(shape.parameters()))


def test_stacked_matrices_have_what_each_has_alone() -> None:
    stacked = _random(3, copies=(4,))
    alone = _random(3)
    for number in range(4):
        alone.load_state_dict({name: tensor[number] for name, tensor in stacked.state_dict().items()})
        assert torch.equal(stacked.weight_delta()[number], alone.weight_delta())
        for one, other in zip(stacked.as_lora()[:2], alone.as_lora()[:2], strict=True):
            assert torch.equal(one[number], other)


def test_one_block_is_lora_bit_for_bit() -> None:
    place = Place(6, 12, CPU, torch.float32)
    blocks, lora = Blocks(place, 2, 0.5, blocks=1), low_rank(place, 2, 0.5)
    x = torch.randn(5, 12)
    for shape in (blocks, lora):
        with torch.no_grad():
            shape.start(lambda tensor, name="": draw(tensor, "site" + name, 7))
    assert torch.equal(blocks.lora_A[0], lora.lora_A.weight)
    value = torch.randn(6, 2)
    for parameter in (blocks.lora_B, lora.lora_B.weight):
        parameter.data.copy_(value)
    assert torch.equal(blocks.delta(x), lora.lora_B(lora.lora_A(x)) * 0.5)
    assert torch.equal(blocks.weight_delta(), lora.weight_delta())


def test_the_bound_at_the_start_is_that_of_a_block() -> None:
    shape = Blocks(Place(6, 300, CPU, torch.float32), 50, 1.0, blocks=3)
    with torch.no_grad():
        shape.start(lambda tensor, name="": draw(tensor, name, 0))
    assert 0.99 / 10 < float(shape.lora_A.detach().abs().max()) <= 1 / 10
    assert not shape.lora_B.any()


def test_the_record_counts_checks_and_survives_its_file() -> None:
    record = Record(rank=2, alpha=4.0, blocks=3)
    assert shape_from_dict(shape_as_dict(record)) == record
    assert [part.entries for part in record.parts(12, 6)] == [24, 12]
    assert record.lora_rank == 6
    record.check(12, 6)
    with pytest.raises(PlanError, match="cannot be cut into 3 equal blocks"):
        record.check(12, 8)
    with pytest.raises(PlanError, match="0 blocks"):
        Record(rank=2, alpha=4.0, blocks=0)
