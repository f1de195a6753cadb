"""`Plan`: the adapter of each site, the method and options that chose them, and the cost."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from apportion.errors import PlanError
from apportion.records.cost import Cost
from apportion.records.files import write_text
from apportion.records.json_file import read_json
from apportion.records.placement import Placement
from apportion.records.plan_schema import read_schema, seal_of_schema_1, write_schema

PLAIN, LORI = "plain", "lori"


@dataclass(frozen=True)
class Plan:
    """The adapter of each site of one model, the method and options that chose them, and the cost.

    Args:
        method: The method's name.
        options: All options of the method, including defaults.
        rank: The default rank.
        alpha: The default scale numerator.
        seed: Random seed, for methods that sample.
        model: Description of the model, for messages.
        base_model: Source of the profiled model (``embedded``, a hub id, a path), if known.
        fingerprint: Fingerprint of the model's architecture.
        profile_digest: Digest of the profile that the plan was made from, if any.
        cost: Exact cost.
        placements: One entry per site, in the layout's order.
        procedure: Training procedure: its ``name`` and its arguments.
        derived_from: Seals of the plans that this plan was made from, if any.
    """

    method: str
    options: dict[str, Any]
    rank: int
    alpha: float
    seed: int
    model: str
    base_model: str | None
    fingerprint: str
    profile_digest: str | None
    cost: Cost
    placements: tuple[Placement, ...] = field(repr=False)
    procedure: dict[str, Any] = field(default_factory=lambda: {"name": PLAIN})
    derived_from: tuple[str, ...] = ()

    @cached_property
    def by_site(self) -> dict[str, Placement]:
        """Placements by site name."""
        return {placement.site: placement for placement in self.placements}

    @property
    def is_sparse(self) -> bool:
        """Whether some site has a sparse B and a frozen A."""
        return any(placement.sparsity for placement in self.placements)

    @property
    def is_mergeable(self) -> bool:
        """Whether the adapters can be merged into the weights. Routed adapters cannot."""
        return not any(placement.is_routed for placement in self.placements)

    @property
    def num_lora_experts(self) -> int:
        """Number of LoRA experts over all sites; plain LoRA counts as one."""
        return sum(placement.num_experts for placement in self.placements)

    def experts_by_layer(self) -> dict[str, list[int]]:
        """Return the ids of the planned experts by experts module, in ascending order."""
        expert_ids: dict[str, set[int]] = {}
        for placement in self.placements:
            module, expert, _ = placement.name
            if expert is not None:
                expert_ids.setdefault(module, set()).add(expert)
        return {name: sorted(ids) for name, ids in expert_ids.items()}

    @cached_property
    def seal(self) -> str:
        """SHA-256 over the whole plan."""
        return str(self._data["seal"])

    @cached_property
    def known_seals(self) -> tuple[str, str]:
        """The plan's seal, and its seal under the earlier schema."""
        return self.seal, seal_of_schema_1(self._values())

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, as in its file."""
        return copy.deepcopy(self._data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a JSON file, atomically."""
        write_text(path, json.dumps(self.as_dict(), indent=1) + "\n")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Rebuild a plan from `as_dict` and verify its seal.

        Args:
            data: Plain data, of schema 1 or 2.

        Returns:
            The plan.

        Raises:
            PlanError: a field is missing, unknown or of the wrong type, the schema is not supported, the contents do
                not match the seal, or an adapter is impossible.
        """
        return cls(**read_schema(data))

    @cached_property
    def _data(self) -> dict[str, Any]:
        """The plan as plain data, made and hashed once."""
        return write_schema(self._values())

    def _values(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Load a plan and verify its seal.

    Args:
        path: A file written by `Plan.save`.

    Returns:
        The plan, equal to the saved one.

    Raises:
        PlanError: the file is missing, is not a plan, has an unsupported schema, or was damaged or edited.
    """
    file = Path(path)
    if not file.is_file():
        raise PlanError(
            f"the plan {file} does not exist.", fix=f"make one: apportion plan PROFILE --method NAME -o {file}"
        )
    data = read_json(
        file,
        lambda found: PlanError(f"the plan {file} is truncated or not JSON.", found=found, fix="plan again"),
    )
    try:
        return Plan.from_dict(data)
    except PlanError as error:
        raise error.within(f"the plan {file} cannot be used").adding(fix="plan again") from error
