"""An adapter's checkpoint: gather and name its tensors, check them, and load them into the model."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apportion.adapters.hosts.wrapped import WrappedModule
from apportion.adapters.shapes.base import Adapter, Size, Tensors
from apportion.adapters.shapes.sparse import SparseOptions
from apportion.counting import count
from apportion.errors import AdapterError
from apportion.peft.shapes import tensor_sizes
from apportion.records.placement import Placement
from apportion.records.plan import Plan
from apportion.records.site import Layout, Site

PREFIX = "base_model.model."
_DIGEST_LENGTH = 8  # hexadecimal digits per tensor
_FIX = "copy the whole adapter again, or train it again"


def gathered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather sharded tensors.

    Every process that holds a shard must call this. All processes gather the tensors in the same order.

    Args:
        state: Tensors by name.

    Returns:
        The tensors, gathered.
    """
    return {name: _whole(state[name]) for name in sorted(state)}


def to_file(state: Mapping[str, Tensor], model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Name an adapter's tensors by site, as checkpoints do, and cut stacked ones into one per expert.

    Args:
        state: The adapter's tensors under their names in the model. Missing ones stay missing.
        model: The model with the adapter.
        adapter: The adapter's name.

    Returns:
        The tensors. Their names still contain the adapter's, which PEFT removes.
    """
    by_host: dict[str, Tensors] = defaultdict(dict)
    named: dict[str, Tensor] = {}
    for key, tensor in state.items():
        host, found, name = key.partition(f".lora_shape.{adapter}.")
        if found:
            by_host[host][name] = tensor
        else:
            named[key] = tensor
    for host, shape in _hosts(model, adapter):
        for site, tensors in shape.split(by_host[host]).items() if host in by_host else ():
            for name, tensor in tensors.items():
                first, dot, last = name.partition(".")
                named[f"{host}{site}.{first}.{adapter}{dot}{last}"] = tensor
    return named


def from_file(
    state: Mapping[str, Tensor], model: nn.Module, adapter: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Undo `to_file`.

    Args:
        state: All of the adapter's tensors under their names in a checkpoint.
        model: The model with the adapter.
        adapter: The adapter's name.

    Returns:
        The tensors of this package's modules under their names in the model, and all other tensors unchanged.
    """
    by_site: dict[str, Tensors] = defaultdict(dict)
    for key, tensor in state.items():
        site, _, name = key.removeprefix(PREFIX).rpartition(".lora_")
        by_site[site][f"lora_{name}"] = tensor
    named: dict[str, Tensor] = {}
    taken: set[str] = set()
    for host, shape in _hosts(model, adapter):
        sites = {site: host.removeprefix(PREFIX) + site for site in shape.sites()}
        joined = shape.join({site: by_site[name] for site, name in sites.items()})
        named |= {f"{host}.lora_shape.{adapter}.{name}": tensor for name, tensor in joined.items()}
        taken.update(sites.values())
    rest = {k: t for k, t in state.items() if k.removeprefix(PREFIX).rpartition(".lora_")[0] not in taken}
    return named, rest


def check_tensors(state: Mapping[str, Tensor], plan: Plan, layout: Layout, options: SparseOptions, place: str) -> None:
    """Refuse an adapter's tensors unless they are exactly those of its plan, with finite numbers.

    Args:
        state: The tensors under their names in a checkpoint.
        plan: The adapter's plan.
        layout: The model's sites.
        options: How the adapter's sparse factors are stored.
        place: Where the tensors come from, for messages.

    Raises:
        AdapterError: tensors are missing or unexpected, have the wrong shape or type, or contain a non-finite number.
    """
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    expected = expected_sizes(plan, layout, options)
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


def check_complete(state: Mapping[str, Tensor], plan: Plan, layout: Layout, options: SparseOptions, place: str) -> None:
    """Refuse to save an adapter's tensors unless all of them are there, and no others.

    Args:
        state: The tensors under their names in a checkpoint.
        plan: The adapter's plan.
        layout: The model's sites.
        options: How the adapter's sparse factors are stored.
        place: Which adapter it is, for messages.

    Raises:
        AdapterError: tensors are missing or unexpected. PEFT leaves tensors out if another adapter's name is part of
            their names.
    """
    names, expected = {name.removeprefix(PREFIX) for name in state}, set(expected_sizes(plan, layout, options))
    _refuse(sorted(expected - names), "missing", place)
    _refuse(sorted(names - expected), "not part of its plan", place)


def expected_sizes(plan: Plan, layout: Layout, options: SparseOptions) -> dict[str, Size | None]:
    """Return the tensors that an adapter's checkpoint must contain.

    Args:
        plan: The adapter's plan.
        layout: The model's sites.
        options: How the adapter's sparse factors are stored.

    Returns:
        Shapes by name, without PEFT's prefix; None if the shape depends on the number of kept entries.
    """
    sizes: dict[str, Size | None] = {}
    for placement in plan.placements:
        site = layout.by_name[placement.site]
        of_site = tensor_sizes(placement.shape, site.out_features, site.in_features, options)
        sizes |= {f"{site.name}.{name}": size for name, size in of_site.items()}
    return sizes


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


def _hosts(model: nn.Module, adapter: str) -> Iterator[tuple[str, Adapter]]:
    """Iterate over the paths of this package's modules that have the adapter, and its module in each."""
    for path, module in model.named_modules():
        if isinstance(module, WrappedModule) and adapter in module.lora_shape:
            yield path, module.lora_shape[adapter]
