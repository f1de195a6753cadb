"""Plans, profiles, masks and partial totals."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

import apportion
from apportion.discovery import find_sites
from apportion.errors import ApportionError, ApportionWarning
from apportion.profiling.totals import PartialFile
from apportion.records.arrays import Array, digest
from apportion.records.files import seal
from apportion.records.mask import Mask, load_mask
from apportion.records.plan import Plan
from apportion.records.profile import Profile
from apportion.records.tensors import arrays_of
from faults.judges import possible_mask, possible_plan, possible_profile, sealed
from faults.kind import JSON, TENSORS, Kind, RefusedError
from faults.mutations import TEXT, VALUES, change_json


def plan_kinds(folder: Path, plans: Mapping[str, Plan]) -> list[Kind]:
    path = folder / "plan.json"
    plans["plan"].save(path)

    def read() -> dict[str, Any]:
        return apportion.load_plan(path).as_dict()

    def reseal(draw: Random, data: bytes) -> bytes:
        facts = plans[draw.choice(sorted(plans))].as_dict() if draw.random() < 0.5 else json.loads(data)
        facts = change_json(draw, {name: value for name, value in facts.items() if name != "seal"})
        return json.dumps(facts | {"seal": seal(facts)} if isinstance(facts, dict) else facts).encode()

    return [
        Kind("plan", path, read, JSON, sealed),
        Kind("plan, resealed", path, read, (reseal,), possible_plan, 200),
    ]


def profile_kinds(folder: Path, profile: Profile) -> list[Kind]:
    path = folder / "p.safetensors"
    profile.save(path)

    def read() -> dict[str, Any]:
        read = apportion.load_profile(path)
        tensors = {"counts": read.counts, "mass": read.routing_mass}
        plain = {name: {task: part.tolist() for task, part in parts.items()} for name, parts in tensors.items()}
        types = {name: [str(part.dtype) for part in parts.values()] for name, parts in tensors.items()}
        facts = {"layout": read.layout.as_dict(), "tokens": read.tokens, "sensitivity": read.sensitivity}
        _plan_from(read)
        return {**plain, "types": types, **facts, "provenance": read.provenance}

    def reseal(draw: Random, data: bytes) -> bytes:
        return _resealed(draw, path, data, "apportion_profile", digest)

    return [
        Kind("profile", path, read, (*TENSORS, *TEXT), sealed),
        Kind("profile, resealed", path, read, (reseal,), possible_profile, 200),
    ]


def _plan_from(profile: Profile) -> None:
    """Plan from all that a profile measured: what was read can be used, or is refused."""
    for method, options in (
        ("hellora", {"hot": 2}),
        ("gradient", {"budget": 3000}),
        ("marginal", {"budget": "flops=9000"}),
    ):
        with suppress(ApportionError):
            apportion.plan(profile, method, **options)


def mask_kinds(folder: Path, mask: Mask) -> list[Kind]:
    path = folder / "mask.safetensors"
    mask.save(path)

    def read() -> dict[str, Any]:
        read = load_mask(path)
        indices = {site: kept.tolist() for site, kept in read.indices.items()}
        types = sorted({str(kept.dtype) for kept in read.indices.values()})
        facts = {"shapes": read.shapes, "a_checksum": read.a_checksum, "provenance": read.provenance}
        return {"indices": indices, "types": types, **facts}

    def reseal(draw: Random, data: bytes) -> bytes:
        return _resealed(draw, path, data, "apportion_mask", _mask_digest)

    return [
        Kind("mask", path, read, (*TENSORS, *TEXT), sealed),
        Kind("mask, resealed", path, read, (reseal,), possible_mask, 200),
    ]


def _mask_digest(header: dict[str, Any], indices: Mapping[str, Array]) -> str:
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for site in sorted(indices):
        total.update(site.encode())
        total.update(indices[site].tobytes())
    return total.hexdigest()


def _resealed(
    draw: Random, path: Path, data: bytes, name: str, hashed: Callable[[dict[str, Any], dict[str, Array]], str]
) -> bytes:
    """Change a safetensors file's header or tensors as a foreign tool would, and hash it again."""
    path.write_bytes(data)
    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()[name])
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    header.pop("digest")
    if draw.random() < 0.5:
        header = change_json(draw, header)
    else:
        key = draw.choice(sorted(tensors))
        tensors = _changed_tensors(draw, tensors, key)
    if not isinstance(header, dict):
        return save(tensors, {name: json.dumps(header)})
    try:
        written = header | {"digest": hashed(header, arrays_of(tensors))}
    except UnicodeEncodeError:
        written = header
    return save(tensors, {name: json.dumps(written)})


def _changed_tensors(draw: Random, tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    tensor = tensors[key]
    types = (torch.int32, torch.int64, torch.uint8, torch.float16, torch.float32, torch.float64, torch.bool)
    number = draw.choice([value for value in VALUES if isinstance(value, int | float) and abs(value) < 2**31])
    place = draw.randrange(max(1, tensor.numel()))
    changed = tensor.clone().reshape(-1)
    if tensor.is_floating_point() or float(number).is_integer():
        changed[place : place + 1] = number
    others: list[Tensor | None] = [
        changed.view_as(tensor), changed.view_as(tensor), changed.view_as(tensor), -tensor, tensor.flip(0), tensor[:0],
        tensor[None], tensor.reshape(-1)[:1].reshape(()), torch.cat([tensor, tensor]), tensor.to(draw.choice(types)),
        tensor.to(draw.choice(types)), None,
    ]  # fmt: skip
    other = draw.choice(others)
    rest = {name: kept for name, kept in tensors.items() if name != key}
    name = draw.choice((key, key, key, key, "x"))
    return rest if other is None else rest | {name: other.contiguous()}


def partial_kind(folder: Path, model: nn.Module) -> Kind:
    path, layout = folder / "p.partial", find_sites(model)
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    streams = {task: [{"input_ids": ids, "labels": ids}] for task in ("a", "b")}
    apportion.profile(model, streams, sensitivity=True, partial=path, keep_partial=True)
    with safe_open(path, framework="pt") as opened:
        identity = json.loads(opened.metadata()["apportion_partial"])["identity"].rpartition("/")[0]

    def read() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ApportionWarning)
            try:
                totals = PartialFile(path, identity).read(layout)
            except ApportionWarning as warning:
                raise RefusedError(str(warning)) from warning
        return {task: [part.counts.tolist(), part.mass.tolist(), part.tokens, part.sensitivity, part.seen]
                for task, part in totals.items()}  # fmt: skip

    return Kind("partial totals", path, read, (*TENSORS, *TEXT), sealed)
