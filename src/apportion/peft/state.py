"""An adapter's checkpoint: gather and name its tensors, check them, and load them into the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apportion.adapters.factors import FrozenFactor, SparseFactor
from apportion.adapters.hosts.experts import ExpertLora
from apportion.adapters.hosts.linear import LinearLora
from apportion.adapters.hosts.weight import WeightLora
from apportion.counting import count
from apportion.errors import AdapterError
from apportion.records.placement import Placement
from apportion.records.plan import Plan
from apportion.records.site import Layout, Site

PREFIX = "base_model.model."
_DIGEST_LENGTH = 8  # hexadecimal digits per tensor
_FIX = "copy the whole adapter again, or train it again"

TensorShape = tuple[int, ...]


class Stores(NamedTuple):
    """Contents of a sparse adapter's checkpoints: whether the frozen A is stored, and all of B or only kept entries."""

    frozen_a: bool
    dense_b: bool


def gathered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather sharded tensors.

    Every process that holds a shard must call this. All processes gather the tensors in the same order.

    Args:
        state: Tensors by name.

    Returns:
        The tensors, gathered.
    """
    return {name: _whole(state[name]) for name in sorted(state)}


def unstacked(state: dict[str, Tensor], model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Split stacked factors into one tensor per expert, each with its own name.

    Args:
        state: The adapter's tensors under their names in the model.
        model: The model with the adapter.
        adapter: The adapter's name.

    Returns:
        The tensors, with stacked factors replaced by one tensor per expert. Missing factors stay missing.
    """
    rest = dict(state)
    single: dict[str, Tensor] = {}
    for path, module in _expert_modules(model, adapter):
        for name, factors in module.factors[adapter].items():
            ranks, keys = list(factors.ranks), [f"{path}.{expert}.{name}" for expert in factors.experts]
            a_name, b_name = f"{path}.lora_A.{adapter}.{name}", f"{path}.lora_B.{adapter}.{name}"
            a_RI = rest.pop(a_name, rest.pop(f"{a_name}.weight", None))
            if a_RI is not None:
                parts = zip(keys, torch.split(a_RI, ranks), strict=True)
                single |= {f"{key}.lora_A.{adapter}.weight": part.clone() for key, part in parts}
            b_RO, values = rest.pop(b_name, None), rest.pop(f"{b_name}.values", None)
            rest.pop(f"{b_name}.indices", None)
            if b_RO is not None:
                parts = zip(keys, torch.split(b_RO, ranks), strict=True)
                single |= {f"{key}.lora_B.{adapter}.weight": part.t().contiguous() for key, part in parts}
            if values is not None and factors.indices is not None:
                pieces = torch.split(values, [len(indices) for indices in factors.indices])
                for key, part, indices in zip(keys, pieces, factors.indices, strict=True):
                    single[f"{key}.lora_B.{adapter}.values"] = part.clone()
                    single[f"{key}.lora_B.{adapter}.indices"] = indices.to(torch.int32)
    return rest | single


def restacked(state: dict[str, Tensor], model: nn.Module, adapter: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Undo `unstacked`, and set the kept entries of sparse factors.

    Args:
        state: The adapter's tensors under their names in a checkpoint.
        model: The model with the adapter.
        adapter: The adapter's name.

    Returns:
        The stacked factors under their names in the model, and all other tensors unchanged.
    """
    rest = dict(state)
    stacked: dict[str, Tensor] = {}
    for path, module in _expert_modules(model, adapter):
        source = path if any(key.startswith(path + ".") for key in rest) else PREFIX + path
        stacked |= _restacked_module(rest, source, path, module, adapter)
    for path, module in model.named_modules():
        if isinstance(module, (LinearLora, WeightLora)) and adapter in module.lora_B:
            factor = module.lora_B[adapter]
            indices = rest.get(f"{path}.lora_B.indices", rest.get(f"{PREFIX}{path}.lora_B.indices"))
            if isinstance(factor, SparseFactor) and indices is not None:
                factor.keep(indices)
    return stacked, rest


def _restacked_module(
    state: dict[str, Tensor], source: str, path: str, module: ExpertLora, adapter: str
) -> dict[str, Tensor]:
    """Remove one layer's factors from a checkpoint's tensors, and stack them."""
    stacked: dict[str, Tensor] = {}
    for name, factors in module.factors[adapter].items():
        keys = [f"{source}.{expert}.{name}" for expert in factors.experts]

        def take(ending: str, keys: list[str] = keys) -> list[Tensor] | None:
            whole = all(f"{key}.{ending}" in state for key in keys)
            return [state.pop(f"{key}.{ending}") for key in keys] if whole else None

        a, b = take("lora_A.weight"), take("lora_B.weight")
        values, indices = take("lora_B.values"), take("lora_B.indices")
        a_name, b_name = f"{path}.lora_A.{adapter}.{name}", f"{path}.lora_B.{adapter}.{name}"
        if a is not None:
            frozen = isinstance(module.lora_A[adapter][name], FrozenFactor)
            stacked[f"{a_name}.weight" if frozen else a_name] = torch.cat(a)
        if b is not None:
            stacked[b_name] = torch.cat([part.t() for part in b])
        if values is not None and indices is not None:
            module.keep(adapter, name, indices)
            stacked[f"{b_name}.values"] = torch.cat(values)
            stacked[f"{b_name}.indices"] = module.lora_B[adapter][name].indices
    return stacked


def check_tensors(state: Mapping[str, Tensor], plan: Plan, layout: Layout, stores: Stores, place: str) -> None:
    """Refuse an adapter's tensors unless they are exactly those of its plan, with finite numbers.

    Args:
        state: The tensors under their names in a checkpoint.
        plan: The adapter's plan.
        layout: The model's sites.
        stores: What the adapter's checkpoints hold of sparse factors.
        place: Where the tensors come from, for messages.

    Raises:
        AdapterError: tensors are missing or unexpected, have the wrong shape or type, or contain a non-finite number.
    """
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    expected = expected_shapes(plan, layout, stores)
    _refuse(sorted(set(expected) - set(tensors)), "missing", place)
    _refuse(sorted(set(tensors) - set(expected)), "not part of its plan", place)
    wrong_shapes = [
        f"{name}: {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if shape is not None and tuple(tensors[name].shape) != shape
    ]
    _refuse(wrong_shapes, "of another shape", place)
    is_index = {name: name.endswith(".indices") for name in expected}
    wrong_types = [
        f"{name}: {tensors[name].dtype}"
        for name in expected
        if tensors[name].is_floating_point() == is_index[name] or tensors[name].is_complex()
    ]
    _refuse(wrong_types, "of another type", place)
    _check_indices(tensors, plan, layout, place)
    _refuse(non_finite(tensors), "not finite", place)


def expected_shapes(plan: Plan, layout: Layout, stores: Stores) -> dict[str, TensorShape | None]:
    """Return the tensors that an adapter's checkpoint must contain.

    Args:
        plan: The adapter's plan.
        layout: The model's sites.
        stores: What the adapter's checkpoints hold of sparse factors.

    Returns:
        Shapes by name, without PEFT's prefix; None if the shape depends on the number of kept entries.
    """
    shapes: dict[str, TensorShape | None] = {}
    for placement in plan.placements:
        site, rank = layout.by_name[placement.site], placement.total_rank
        is_sparse = placement.sparsity > 0
        if not is_sparse or stores.frozen_a:
            shapes[f"{site.name}.lora_A.weight"] = (rank, site.in_features)
        if is_sparse and not stores.dense_b:
            shapes[f"{site.name}.lora_B.values"] = shapes[f"{site.name}.lora_B.indices"] = None
        else:
            shapes[f"{site.name}.lora_B.weight"] = (site.out_features, rank)
        if placement.is_routed:
            shapes[f"{site.name}.lora_router.weight"] = (placement.num_experts, site.in_features)
    return shapes


def non_finite(state: Mapping[str, Tensor]) -> list[str]:
    """List the tensors that contain NaN or infinity.

    Args:
        state: Tensors by name. Of sharded tensors, only the local shard is checked.

    Returns:
        Names, in the order given.
    """
    local = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
    return [name for name, tensor in local.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]


def digests(state: Mapping[str, Tensor]) -> str:
    """Hash each of an adapter's tensors.

    Args:
        state: Tensors under their names in a checkpoint.

    Returns:
        Eight hexadecimal digits per tensor, in the order of their sorted names.
    """
    return "".join(_digest(name, state[name]) for name in sorted(state))


def check_digests(state: Mapping[str, Tensor], expected: str, place: str) -> None:
    """Check that tensors are those that were saved.

    Args:
        state: Tensors under their names in a checkpoint.
        expected: As `digests` returned it when the adapter was saved.
        place: Where the tensors come from, for messages.

    Raises:
        AdapterError: tensors were changed; the message names them.
    """
    names = sorted(state)
    saved = [expected[start : start + _DIGEST_LENGTH] for start in range(0, len(expected), _DIGEST_LENGTH)]
    if len(saved) != len(names):
        raise AdapterError(
            f"{place} cannot be loaded: its configuration belongs to other tensors.",
            found=f"{len(names)} tensors, digests of {len(saved)}",
            fix=_FIX,
        )
    changed = [name for name, one in zip(names, saved, strict=True) if _digest(name, state[name]) != one]
    _refuse(changed, "not those that were saved", place)


def _whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that is sharded over processes."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole


def _digest(name: str, tensor: Tensor) -> str:
    """Hash one tensor with its name, type and shape."""
    plain = tensor.detach().cpu().contiguous()
    total = hashlib.sha256(f"{name.removeprefix(PREFIX)}|{plain.dtype}|{tuple(plain.shape)}|".encode())
    total.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:_DIGEST_LENGTH]


def _check_indices(state: Mapping[str, Tensor], plan: Plan, layout: Layout, place: str) -> None:
    """Raise an error if kept entries are out of range or repeated, or their number is not the planned one."""
    sparse = [placement for placement in plan.placements if f"{placement.site}.lora_B.indices" in state]
    wrong = [placement.site for placement in sparse if not _is_valid(state, placement, layout.by_name[placement.site])]
    _refuse([f"{site}.lora_B.indices" for site in wrong], "no positions in their matrices", place)
    num_kept = sum(len(state[f"{placement.site}.lora_B.indices"]) for placement in sparse)
    num_planned = count(sparse, layout.by_name).indices
    if num_kept != num_planned:
        raise AdapterError(
            f"{place} cannot be loaded: it keeps another number of entries than its plan.",
            found=f"{num_kept:,}, expected {num_planned:,}",
            fix=_FIX,
        )


def _is_valid(state: Mapping[str, Tensor], placement: Placement, site: Site) -> bool:
    """Return whether a sparse factor's positions are increasing and in range, with one value each."""
    indices, values = (state[f"{site.name}.lora_B.{part}"] for part in ("indices", "values"))
    if indices.ndim != 1 or indices.shape != values.shape:
        return False
    ends = bool(len(indices) == 0 or (indices[0] >= 0 and indices[-1] < placement.total_rank * site.out_features))
    return ends and bool((indices.diff() > 0).all())


def _refuse(names: list[str], problem: str, place: str) -> None:
    """Raise an error that names some tensors, if there are any."""
    if names:
        verb = "tensor is" if len(names) == 1 else "tensors are"
        raise AdapterError(
            f"{place} cannot be loaded: {len(names)} {verb} {problem}.", details={"tensors": names}, fix=_FIX
        )


def _expert_modules(model: nn.Module, adapter: str) -> Iterator[tuple[str, ExpertLora]]:
    """Iterate over the stacked experts that have an adapter of this name."""
    for path, module in model.named_modules():
        if isinstance(module, ExpertLora) and adapter in module.factors:
            yield path, module
