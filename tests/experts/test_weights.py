"""Values of stacked base weights: equal to the bit to dequantising the whole, and no more computed than asked for."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Params4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, Int8WeightOnlyConfig, PerTensor, quantize_
from transformers import GptOssConfig, OlmoeConfig

from apportion.errors import ConfigurationError
from apportion.experts.weights import chunks, dense, refuse_unreadable, stacked_weight
from tiny_models import build_tiny

SHAPE = (6, 48, 64)
TORCHAO = {
    "int8": Int8WeightOnlyConfig(),
    "int8 per tensor": Int8WeightOnlyConfig(granularity=PerTensor()),
    "float8": Float8WeightOnlyConfig(),
}


class Stack(nn.Module):
    """Experts stacked in `w`, and once more in `inner.flat` with their rows one under the other, as DBRX has them."""

    def __init__(self, shape: Sequence[int] = SHAPE, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.num_experts = shape[0]
        self.w = nn.Parameter(torch.randn(*shape, dtype=dtype), requires_grad=False)
        self.inner = nn.Module()
        self.inner.flat = nn.Parameter(torch.randn(shape[0] * shape[1], shape[2], dtype=dtype), requires_grad=False)


def in_four_bits(module: Stack, **options: Any) -> Stack:
    replace_parameter_4bit(module, "w", **options)
    replace_parameter_4bit(module.inner, "flat", **options)
    return module


def by_torchao(module: Stack, name: str) -> Stack:
    quantize_(module, FqnToConfig({"w": TORCHAO[name], "inner.flat": TORCHAO[name]}), filter_fn=None)
    return module


QUANTISED: dict[str, Callable[[], Stack]] = {
    "nf4": lambda: in_four_bits(Stack()),
    "fp4, double": lambda: in_four_bits(Stack(), quant_type="fp4", compress_statistics=True),
    **{name: lambda name=name: by_torchao(Stack(), name) for name in TORCHAO},  # type: ignore[misc]
}
PARAMETERS = ["w", "inner.flat"]


def whole_of(module: Stack, parameter: str) -> Tensor:
    """Dequantise all experts as the library does."""
    value = module.w if parameter == "w" else module.inner.flat
    if type(value).dequantize is not Tensor.dequantize:
        value = value.dequantize()
    return value.detach().view(SHAPE)


class Outputs(TorchDispatchMode):
    """Records the size of every floating-point tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        self.sizes += [tensor.numel() for tensor in made if tensor.is_floating_point()]
        return out


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_a_plain_parameter_is_viewed(parameter: str) -> None:
    module = Stack()
    value = module.get_parameter(parameter)
    for experts in (slice(None), slice(2, 4), [2, 3], range(1, 5), [5]):
        found = dense(module, parameter, experts, torch.bfloat16)
        assert torch.equal(found, value.view(SHAPE)[experts])
        assert found.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_ids_come_in_any_order(parameter: str) -> None:
    module = Stack()
    value = module.get_parameter(parameter).view(SHAPE)
    for experts in ([4, 0, 1, 1], range(5, -1, -2), slice(0, 6, 2), []):
        ids = list(range(6))[experts] if isinstance(experts, slice) else list(experts)
        assert torch.equal(dense(module, parameter, experts, torch.float32), value[ids].float())


@pytest.mark.parametrize("experts", [[6], [-1], [0, 7], range(3, 8)])
def test_an_expert_that_there_is_not_is_an_error(experts: Sequence[int]) -> None:
    with pytest.raises(IndexError, match="not all among the 6"):
        dense(Stack(), "w", experts, torch.float32)


def test_a_plain_parameter_that_trains_gets_its_gradient() -> None:
    module = Stack(dtype=torch.float32)
    module.w.requires_grad_()
    dense(module, "w", [1, 4], torch.float32).sum().backward()
    assert module.w.grad is not None
    assert module.w.grad.sum((1, 2)).tolist() == [0, 48 * 64, 0, 0, 48 * 64, 0]


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("form", QUANTISED)
def test_an_expert_equals_its_part_of_the_whole_to_the_bit(form: str, parameter: str) -> None:
    module = QUANTISED[form]()
    whole = whole_of(module, parameter)
    for experts in (slice(None), *([expert] for expert in range(6)), [1, 2], [5, 0, 3]):
        found = dense(module, parameter, experts, torch.bfloat16)
        assert type(found) is Tensor
        assert torch.equal(found, whole[experts])
    assert torch.equal(dense(module, parameter, [4], torch.float32), whole[[4]].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(6, 48, 64), (5, 24, 90), (7, 3, 5), (300, 8, 8)])
def test_four_bits_are_read_by_expert_whatever_blocks_they_are_in(
    shape: tuple[int, int, int], blocksize: int, quant_type: str, nested: bool, dtype: torch.dtype
) -> None:
    module = Stack(shape, dtype)
    w = module.w.detach().clone()
    options = {"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": nested}
    packed, state = quantize_4bit(w, **options)
    state.shape = torch.Size((1, w.numel()))
    whole = dequantize_4bit(packed, state).view(shape)
    in_four_bits(module, **options)
    for expert in range(0, shape[0], 1 + shape[0] // 10):
        assert torch.equal(dense(module, "w", [expert], dtype), whole[[expert]])
    assert torch.equal(dense(module, "w", slice(None), dtype), whole)
    error = (whole - w).abs().mean() / w.abs().mean()
    assert error < (0.2 if quant_type == "fp4" or blocksize == 4096 else 0.13)


def test_four_bits_in_a_parameter_of_their_own_class_are_read() -> None:
    module = Stack()
    w = module.w.detach().clone()
    packed, state = quantize_4bit(w, quant_type="nf4", quant_storage=torch.bfloat16)
    module.w = Params4bit(packed, quant_state=state, quant_type="nf4", bnb_quantized=True)
    whole = dequantize_4bit(packed, state)
    assert stacked_weight(module, "w").shape == SHAPE
    assert torch.equal(dense(module, "w", [3, 1], torch.bfloat16), whole[[3, 1]])


@pytest.mark.parametrize("name", ["int8", "float8"])
def test_an_expert_dequantised_is_its_part_of_the_whole(name: str) -> None:
    w: Any = by_torchao(Stack(), name).w
    whole = w.dequantize()
    assert all(torch.equal(w[expert].dequantize(), whole[expert]) for expert in range(6))


@pytest.mark.parametrize("form", ["plain", *QUANTISED])
@pytest.mark.parametrize("parameter", PARAMETERS)
def test_shape_type_and_device_are_those_before_quantisation_and_no_value_is_read(form: str, parameter: str) -> None:
    module = Stack() if form == "plain" else QUANTISED[form]()
    with Outputs() as outputs:
        weight = stacked_weight(module, parameter)
        assert weight.shape == SHAPE
        assert weight.dtype == torch.bfloat16
        assert weight.device == torch.device("cpu")
        assert weight.is_exact == (form == "plain")
        refuse_unreadable(module, "experts", PARAMETERS)
    assert outputs.sizes == []


def test_a_reader_keeps_the_tensors_that_it_was_made_with() -> None:
    module = Stack()
    weight, before = stacked_weight(module, "w"), module.w
    module.w = nn.Parameter(torch.zeros(1), requires_grad=False)
    assert torch.equal(weight.dense([2], torch.bfloat16), before[[2]])


def test_a_parameter_on_meta_has_its_shape() -> None:
    with torch.device("meta"):
        module = Stack()
    assert stacked_weight(module, "inner.flat").shape == SHAPE
    assert stacked_weight(module, "w").device.type == "meta"


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("form", QUANTISED)
def test_one_expert_is_read_without_making_the_others(form: str, parameter: str) -> None:
    module = QUANTISED[form]()
    whole_of(module, parameter)  # tables that are made once
    with Outputs() as outputs:
        dense(module, parameter, [2], torch.bfloat16)
    assert max(outputs.sizes) == math.prod(SHAPE[1:])


def test_scales_of_scales_are_read_for_the_expert_alone() -> None:
    module = in_four_bits(Stack((100, 32, 64)), compress_statistics=True)  # 3200 scales, in blocks of 256
    with Outputs() as outputs:
        dense(module, "w", [1], torch.bfloat16)
    assert max(outputs.sizes) == 32 * 64


class Doubled(nn.Module):
    """Computes a parameter from another one."""

    def forward(self, original: Tensor) -> Tensor:
        return original * 2


class Halved(nn.Module):
    """Gives fewer experts than there are numbers for."""

    def forward(self, original: Tensor) -> Tensor:
        return original[::2]


def test_a_parameter_that_is_computed_is_read_and_is_not_to_be_written_to() -> None:
    module = Stack()
    expected = 2 * module.w.detach()
    parametrize.register_parametrization(module, "w", Doubled())
    assert torch.equal(dense(module, "w", [5, 1], torch.bfloat16), expected[[5, 1]])
    assert stacked_weight(module, "w").shape == SHAPE
    assert not stacked_weight(module, "w").is_exact


def _with(value: Any, **others: Tensor) -> Stack:
    module = Stack()
    del module.w
    module.w = value
    for name, other in others.items():
        module.register_buffer(name, other)
    return module


def _halved() -> Stack:
    module = Stack()
    parametrize.register_parametrization(module, "w", Halved(), unsafe=True)
    return module


UNREADABLE: dict[str, tuple[Callable[[], Stack], str]] = {
    "bytes": (lambda: _with(nn.Parameter(torch.zeros(SHAPE, dtype=torch.uint8), requires_grad=False)), "torch.uint8"),
    "float8": (lambda: _with(torch.zeros(SHAPE, dtype=torch.float8_e4m3fn)), "torch.float8_e4m3fn"),
    "scales beside it": (lambda: _with(nn.Parameter(torch.ones(SHAPE)), w_scale_inv=torch.ones(6)), "w_scale_inv"),
    "no tensor": (lambda: _with(object()), "a object"),
    "four axes": (lambda: _with(torch.ones(2, 3, 4, 5)), r"of shape \(2, 3, 4, 5\)"),
    "computed, of another shape": (_halved, "a parametrisation by Halved"),
}


@pytest.mark.parametrize("form", UNREADABLE)
def test_a_form_without_a_reader_is_refused_by_name(form: str) -> None:
    make, found = UNREADABLE[form]
    module = make()
    message = (
        rf"(?s)cannot be read.*place: +model\.experts: \w*Stack.*found: +w, .*{found}.*fix: +load the model without"
    )
    with pytest.raises(ConfigurationError, match=message):
        refuse_unreadable(module, "model.experts", ["inner.flat", "w"])
    with pytest.raises(ConfigurationError, match=found) as caught:
        dense(module, "w", [0], torch.bfloat16)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def _fp8_experts() -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8Experts

    config = OlmoeConfig(hidden_size=128, intermediate_size=128, num_experts=4)
    with torch.device("meta"):
        return FP8Experts(config, block_size=(128, 128))


def _mxfp4_experts() -> nn.Module:
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    return Mxfp4GptOssExperts(GptOssConfig(hidden_size=64, intermediate_size=64, num_local_experts=2))


def _gguf_experts() -> nn.Module:
    from transformers.integrations.gguf.utils import GgufExperts

    return GgufExperts(2, 256, 256, 12, 12, nn.SiLU())


PACKING = {
    "FP8Experts": (_fp8_experts, "FineGrainedFP8Config"),
    "Mxfp4GptOssExperts": (_mxfp4_experts, "Mxfp4Config"),
    "GgufExperts": (_gguf_experts, "GgufConfig"),
}


@pytest.mark.parametrize("name", PACKING)
def test_experts_that_transformers_packs_are_refused_with_the_way_to_load_them(name: str) -> None:
    make, config = PACKING[name]
    module = make()
    assert type(module).__name__ == name
    message = rf"(?s)cannot be read.*place: +layers\.1\.experts: {name}.*fix: .*{config}\(dequantize=True\)"
    with pytest.raises(ConfigurationError, match=message):
        refuse_unreadable(module, "layers.1.experts")
    with pytest.raises(ConfigurationError, match=rf"(?s)found: +down_proj.*{config}"):
        dense(module, "down_proj", [0], torch.bfloat16)
    module.__class__ = type(f"FSDP{name}", (type(module),), {})
    with pytest.raises(ConfigurationError, match=message):
        refuse_unreadable(module, "layers.1.experts")


def test_modules_that_pack_nothing_pass() -> None:
    for path, module in build_tiny("olmoe").named_modules():
        refuse_unreadable(module, path)


def test_a_plain_read_compiles_into_one_graph() -> None:
    module = Stack(dtype=torch.float32)
    x = torch.randn(64)

    def product(x: Tensor) -> Tensor:
        return dense(module, "w", slice(None), torch.float32) @ x + dense(module, "w", [1, 2], torch.float32).sum()

    compiled = torch.compile(product, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), product(x))


@given(st.integers(0, 20), st.integers(1, 10**6), st.integers(0, 10**7))
def test_chunks_hold_every_expert_once_and_stay_within_the_budget(number: int, size: int, budget: int) -> None:
    experts = list(range(100, 100 + number))
    parts = list(chunks(experts, size, budget))
    assert [expert for part in parts for expert in part] == experts
    assert all(len(part) * size <= budget or len(part) == 1 for part in parts)
    assert all((len(part) + 1) * size > budget for part in parts[:-1])


def test_the_quantisers_are_not_imported_before_they_are_needed() -> None:
    code = "import apportion.experts.weights, sys; print(*({'torchao', 'bitsandbytes'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
