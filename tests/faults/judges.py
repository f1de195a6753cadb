"""What a file may hold that was read with other contents than the good one's."""

from __future__ import annotations

from typing import Any

from apportion.records.plan import Plan
from apportion.records.shapes import MAX_WIDTH
from apportion.records.site import MAX_SITES

LARGEST = 2**63


def sealed(contents: Any) -> str:
    """Judge a file whose changes must all be noticed."""
    return "other contents were accepted"


def anything(contents: Any) -> None:
    """Judge a file that nobody sealed."""


def possible_plan(data: dict[str, Any]) -> str | None:
    """Say what no adapter can have."""
    plan = Plan.from_dict(data)
    if len(plan.by_site) != len(plan.placements):
        return "a site twice"
    if len(plan.placements) > MAX_SITES:
        return "too many sites"
    for placement in plan.placements:
        scale = placement.alpha / placement.rank
        if not (1 <= placement.rank * placement.num_experts <= MAX_WIDTH and 2.0**-126 <= scale <= 2.0**127):
            return f"{placement}"
        if not (0 <= placement.sparsity < 1 and 1 <= placement.top_k <= placement.num_experts):
            return f"{placement}"
    cost = plan.cost
    counts = (cost.trainable_parameters, cost.stored_parameters, cost.lora_parameters, cost.stored_indices)
    counts = (*counts, cost.base_parameters - 1, *cost.sites_by_kind.values())
    if not all(type(count) is int and 0 <= count < LARGEST for count in counts):
        return f"{cost}"
    flops = (cost.adapter_flops_per_token, cost.lora_flops_per_token)
    if not all(type(number) in {int, float} and 0 <= number < float("inf") for number in flops):
        return f"{cost}"
    return None if cost.routing in {"profile", "even", "none"} else f"{cost}"


def possible_profile(data: dict[str, Any]) -> str | None:
    """Say what no profiling gives."""
    layout = data["layout"]
    blocks, others = layout["blocks"], layout["others"]
    shape = [len(blocks), max((block["num_experts"] for block in blocks), default=0)]
    sizes = [layout["base_parameters"], *data["tokens"].values()]
    sizes += [site[name] for site in others for name in ("in_features", "out_features")]
    sizes += [p[name] for block in blocks for p in block["projections"] for name in ("in_features", "out_features")]
    sizes += [block[name] for block in blocks for name in ("num_experts", "top_k")]
    if not all(type(size) is int and 0 < size < LARGEST for size in sizes):
        return "sizes that are no whole numbers above 0"
    layers = [part["layer"] for part in (*blocks, *others)]
    if not all(type(layer) is int and 0 <= layer < LARGEST for layer in layers):
        return "layers that are no whole numbers"
    if data["types"] != {
        "counts": ["torch.int64"] * len(data["tokens"]),
        "mass": ["torch.float64"] * len(data["tokens"]),
    }:
        return "tensors of other types"
    for part in (*data["counts"].values(), *data["mass"].values()):
        flat = [number for row in part for number in row]
        if [len(part), len(part[0]) if part else shape[1]] != shape:
            return "tensors of another shape"
        if not all(0 <= number < float("inf") for number in flat):
            return "numbers that are negative or not finite"
    norms = [number for norms in data["sensitivity"].values() for number in norms.values()]
    if not all(type(norm) in {int, float} and 0 <= norm < float("inf") for norm in norms):
        return "sensitivities that are no norms"
    return None if set(data["sensitivity"]) <= set(data["tokens"]) else "sensitivities of an unknown task"


def possible_mask(data: dict[str, Any]) -> str | None:
    """Say what no mask can hold."""
    if data["types"] not in ([], ["torch.int32"]):
        return f"positions of types {data['types']}"
    if set(data["indices"]) != set(data["shapes"]):
        return "other sites than shapes"
    for site, kept in data["indices"].items():
        rows, columns = data["shapes"][site]
        if not (type(rows) is int and type(columns) is int and min(rows, columns) > 0):
            return f"a shape of {rows}, {columns}"
        if kept != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < rows * columns):
            return "positions that do not rise within their matrix"
    return None
