"""The values of stacked base weights: the only place that reads them, however they are stored.

A stacked parameter holds one matrix per expert. It is a plain parameter, or it is quantised: packed by a
parametrisation of bitsandbytes, or a tensor of a class with a ``dequantize`` of its own, as torchao's are. Shapes and
types here are those of the weights before quantisation, and only `dense` computes values, of the experts that it is
asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apportion.compat.torch import parametrisations, stored_buffers, stored_parameters
from apportion.errors import ConfigurationError
from apportion.linear_forms import PLAIN_TYPES

# Shapes: E experts, n of them that are read, O and I rows and columns of an expert's matrix as it is stored.

_DEQUANTISING_CONFIGS = {
    "FP8Experts": "FineGrainedFP8Config",
    "Mxfp4GptOssExperts": "Mxfp4Config",
    "GgufExperts": "GgufConfig",
}


class _UnreadableError(Exception):
    """A parameter has no reader; the message says how it is stored."""


class StackedWeight(NamedTuple):
    """A stacked base parameter as it is before quantisation, whatever holds its numbers.

    Args:
        shape: Shape of all matrices, (E, O, I): the experts first, also where they are stored one under the other.
        dtype: Type of the matrices, which quantised numbers are dequantised to.
        device: Where the numbers are.
        is_exact: Whether they are a plain floating-point parameter, which may be written to in place.
        is_packed: Whether reading dequantises them, which makes new tensors and passes no gradient on.
        read: Gives the matrices from one expert up to another, in any shape.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device
    is_exact: bool
    is_packed: bool
    read: Callable[[int, int], Tensor]

    def whole(self) -> Tensor:
        """Return all matrices in their own type: a view of a plain parameter, dequantised ones of a packed one."""
        matrices = self.read(0, self.shape[0])
        return matrices if matrices.shape == self.shape else matrices.view(self.shape)

    def dense(self, experts: Sequence[int] | slice, dtype: torch.dtype) -> Tensor:
        """Return the matrices of some experts, as the function `dense` does."""
        num_experts, rows, columns = self.shape
        parts = [
            self.read(first, last).view(last - first, rows, columns).to(dtype)
            for first, last in _runs(experts, num_experts)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0, rows, columns, dtype=dtype, device=self.device)


def stacked_weight(module: nn.Module, parameter: str) -> StackedWeight:
    """Find out how a stacked base parameter is stored; no value is read or dequantised.

    Args:
        module: The experts module.
        parameter: The parameter's path in it.

    Returns:
        Its shape, type and device, and its reader, which holds on to the tensors that are there now.

    Raises:
        ConfigurationError: the parameter is stored in a form that cannot be read.
    """
    path, _, name = parameter.rpartition(".")
    owner: Any = module.get_submodule(path) if path else module
    try:
        if name in parametrisations(owner):
            return _parametrised(module, owner, name)
        return _unparametrised(module, owner, name)
    except _UnreadableError as reason:
        raise _refusal(module, f"{parameter}, {reason}") from None


def dense(module: nn.Module, parameter: str, experts: Sequence[int] | slice, dtype: torch.dtype) -> Tensor:
    """Return the matrices of some experts of a stacked base parameter.

    Args:
        module: The experts module.
        parameter: The parameter's path in it.
        experts: Ids of the experts, in any order, or a slice of all ids.
        dtype: Type of the result.

    Returns:
        Shape (n, O, I): the experts first, each matrix as it is stored. A view where the parameter is plain and of this
        type and the ids follow one another, so it must not be written to. Quantised numbers are dequantised to their
        own type first.

    Raises:
        ConfigurationError: the parameter is stored in a form that cannot be read.
        IndexError: there is no such expert.

    Cost: memory and time of the n matrices alone; of all matrices where PyTorch's parametrisation computes the
        parameter. Experts whose ids do not follow one another are copied once more.
    """
    return stacked_weight(module, parameter).dense(experts, dtype)


def chunks(experts: Sequence[int], bytes_per_expert: int, budget_bytes: int) -> Iterator[Sequence[int]]:
    """Cut experts into parts whose dense matrices stay within a budget.

    Args:
        experts: Their ids.
        bytes_per_expert: Bytes of one expert's dense matrices.
        budget_bytes: Bytes that the matrices of one part may take.

    Yields:
        The parts, in order; each has at least one expert, even where that is above the budget.

    Example:
        >>> list(chunks(range(5), bytes_per_expert=100, budget_bytes=250))
        [range(0, 2), range(2, 4), range(4, 5)]
    """
    size = max(1, budget_bytes // max(1, bytes_per_expert))
    for start in range(0, len(experts), size):
        yield experts[start : start + size]


def refuse_unreadable(module: nn.Module, place: str, parameters: Iterable[str] = ()) -> None:
    """Refuse experts whose weights are stored in a form that cannot be read.

    Args:
        module: Any module; those of classes without experts pass.
        place: Its path in the model.
        parameters: Paths of its stacked parameters, where they are known.

    Raises:
        ConfigurationError: the class is known to pack its weights, or a parameter has no reader.
    """
    if _packing_class(module):
        raise _refusal(module, "packed weights").at(place)
    try:
        for parameter in parameters:
            stacked_weight(module, parameter)
    except ConfigurationError as error:
        raise error.at(place) from None


def _packing_class(module: nn.Module) -> str | None:
    """Name the class of experts that packs a module's weights; sharding makes subclasses."""
    return next((base.__name__ for base in type(module).__mro__ if base.__name__ in _DEQUANTISING_CONFIGS), None)


def _refusal(module: nn.Module, found: str) -> ConfigurationError:
    """Return the error for a module whose weights cannot be read."""
    name = _packing_class(module)
    fix = "load the model without quantisation, or quantise its experts with bitsandbytes or torchao"
    if name:
        fix = f"load the model with quantization_config={_DEQUANTISING_CONFIGS[name]}(dequantize=True)"
    return ConfigurationError(
        "the experts' weights are stored in a form that cannot be read.",
        place=name or type(module).__name__,
        expected="floating-point numbers, bitsandbytes' 4 bits, or torchao's int8 or float8",
        found=found,
        fix=fix,
    )


def _runs(experts: Sequence[int] | slice, num_experts: int) -> list[tuple[int, int]]:
    """Join ids that follow one another: the first of each run, and the one after its last."""
    ids = range(*experts.indices(num_experts)) if isinstance(experts, slice) else experts
    if isinstance(ids, range) and ids.step == 1:
        runs = [(ids.start, ids.stop)] if ids else []
    else:
        runs = []
        for expert in ids:
            if runs and runs[-1][1] == expert:
                runs[-1] = (runs[-1][0], expert + 1)
            else:
                runs.append((expert, expert + 1))
    if any(first < 0 or last > num_experts for first, last in runs):
        raise IndexError(f"experts {list(ids)} are not all among the {num_experts} there are")
    return runs


def _unparametrised(module: Any, owner: Any, name: str) -> StackedWeight:
    """Describe a parameter that a module holds itself."""
    own = stored_parameters(owner)
    value: Any = own.get(name)
    exact = type(value) is nn.Parameter
    if value is None:
        value = getattr(owner, name)
    if not isinstance(value, Tensor):
        raise _UnreadableError(f"a {type(value).__name__}")
    state = None if exact else getattr(value, "quant_state", None)
    if state is not None:
        return _four_bit(module, value, state)
    shape = _stacked_shape(module, value.shape)
    dtype, scale_name = value.dtype, f"{name}_scale"
    for key in (*own, *stored_buffers(owner)):
        if key.startswith(scale_name):
            raise _UnreadableError(f"{dtype} with {key}")
    if dtype not in PLAIN_TYPES:
        raise _UnreadableError(f"a {type(value).__name__} of {dtype}")
    packed = not exact and type(value).dequantize is not Tensor.dequantize
    read = functools.partial(_read_dequantising if packed else _read_plain, value, shape)
    return StackedWeight(shape, dtype, value.device, exact, packed, read)


def _parametrised(module: Any, owner: Any, name: str) -> StackedWeight:
    """Describe a parameter that is computed from what a parametrisation holds."""
    chain = owner.parametrizations[name]
    state = getattr(chain[0], "quant_state", None)
    if state is not None and len(chain) == 1:
        return _four_bit(module, chain.original, state)
    if state is not None or chain.unsafe or not chain.is_tensor or chain.original.dtype not in PLAIN_TYPES:
        raise _UnreadableError("a parametrisation by " + ", ".join(type(step).__name__ for step in chain))
    shape, original = _stacked_shape(module, chain.original.shape), chain.original  # PyTorch checked that both agree
    return StackedWeight(
        shape,
        original.dtype,
        original.device,
        is_exact=False,
        is_packed=False,
        read=lambda first, last: _read_plain(getattr(owner, name), shape, first, last),
    )


def _four_bit(module: Any, packed: Tensor, state: Any) -> StackedWeight:
    """Describe numbers that bitsandbytes packed."""
    shape = _stacked_shape(module, state.shape)
    read = functools.partial(_read_four_bit, packed, state, shape)
    return StackedWeight(shape, state.dtype, packed.device, is_exact=False, is_packed=True, read=read)


def _stacked_shape(module: Any, shape: Sequence[int]) -> tuple[int, int, int]:
    """Add the experts' axis to a shape whose rows are those of all experts, one under the other."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if len(shape) == 2:
        return module.num_experts, shape[0] // module.num_experts, shape[1]
    raise _UnreadableError(f"of shape {tuple(shape)}")


def _read_plain(tensor: Tensor, shape: tuple[int, int, int], first: int, last: int) -> Tensor:
    """Return a part of a plain tensor."""
    if last - first == shape[0]:
        return tensor
    rows = len(tensor) // shape[0]
    return tensor[first * rows : last * rows]


@torch.no_grad()
def _read_dequantising(tensor: Any, shape: tuple[int, int, int], first: int, last: int) -> Tensor:
    """Dequantise a part of a tensor that can do so itself."""
    rows = len(tensor) // shape[0]
    part: Tensor = tensor[first * rows : last * rows].dequantize()
    return part


@torch.no_grad()
def _read_four_bit(packed: Tensor, state: Any, shape: tuple[int, int, int], first: int, last: int) -> Tensor:
    """Unpack the blocks that hold some experts, and cut off what the first and the last block hold of others.

    Blocks run over the matrices' numbers in order. Where a row is not a whole number of blocks, bitsandbytes' CPU
    kernel takes the wrong scales, but not for a single row; it shares rows among threads.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    size, total, block = math.prod(shape[1:]), math.prod(shape), state.blocksize
    begin, end = _whole_blocks(first * size, last * size, block, total)
    width = shape[2] if shape[2] % block == 0 else end - begin
    part = QuantState(
        absmax=_absmax(state, begin // block, -(-end // block)),
        shape=torch.Size(((end - begin) // width, width)),
        code=state.code,
        blocksize=block,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    bytes_B1 = packed.view(-1, 1).view(torch.uint8).view(-1, 1)[begin // 2 : -(-end // 2)]
    values: Tensor = dequantize_4bit(bytes_B1, part).view(-1)
    return values[first * size - begin : last * size - begin]


def _absmax(state: Any, first: int, last: int) -> Tensor:
    """Return the scales of some blocks, which may be quantised in blocks themselves."""
    if not state.nested:
        scales: Tensor = state.absmax[first:last]
        return scales
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    block = state.state2.blocksize
    begin, end = _whole_blocks(first, last, block, len(state.absmax))
    scales_of_scales = state.state2.absmax[begin // block : -(-end // block)]
    part = QuantState(absmax=scales_of_scales, code=state.state2.code, blocksize=block, dtype=state.state2.dtype)
    scales = dequantize_blockwise(state.absmax[begin:end], part) + state.offset
    return scales.float()[first - begin : last - begin]


def _whole_blocks(first: int, last: int, block: int, total: int) -> tuple[int, int]:
    """Widen a range to whole blocks; the last block of all may be shorter."""
    return first // block * block, min(-(-last // block) * block, total)
