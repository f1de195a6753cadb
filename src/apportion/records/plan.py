"""`Plan`: which sites get which adapter, how that was decided, and what it costs."""

from __future__ import annotations

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
    """Which sites of one model get which adapter, how that was decided, and what it costs.

    Args:
        method: The method's name.
        options: The method's options, complete with defaults.
        rank: The default rank.
        alpha: The default scale numerator.
        seed: Seed of methods that draw at random.
        model: The model in words, for messages.
        base_model: Where the profiled model came from (``embedded``, a hub id, a path), if known.
        fingerprint: The architecture that the plan is for.
        profile_digest: Digest of the profile that the plan was made from, if any.
        cost: Exact cost.
        placements: One entry per site, in the layout's order.
        procedure: What happens to the adapters in training: its ``name`` and its arguments.
        derived_from: Seals of the plans that this one was made from, if it was.
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
        """Map the sites' names to their placements."""
        return {placement.site: placement for placement in self.placements}

    @property
    def is_sparse(self) -> bool:
        """Whether some site keeps a part of its B alone; its A is then frozen."""
        return any(placement.sparsity for placement in self.placements)

    @property
    def is_mergeable(self) -> bool:
        """Whether the adapters can be folded into the weights: no gate may depend on the input."""
        return not any(placement.is_routed for placement in self.placements)

    @property
    def num_lora_experts(self) -> int:
        """LoRA experts over all sites; a plain LoRA counts as one."""
        return sum(placement.num_experts for placement in self.placements)

    def experts_by_layer(self) -> dict[str, list[int]]:
        """For each experts module with planned experts, their ids in rising order."""
        found: dict[str, set[int]] = {}
        for placement in self.placements:
            module, expert, _ = placement.name
            if expert is not None:
                found.setdefault(module, set()).add(expert)
        return {name: sorted(ids) for name, ids in found.items()}

    @cached_property
    def seal(self) -> str:
        """SHA-256 over the whole plan."""
        return str(self.as_dict()["seal"])

    @cached_property
    def known_seals(self) -> tuple[str, str]:
        """The plan's seal, and the one that earlier versions of its file gave it."""
        return self.seal, seal_of_schema_1(self._values())

    def as_dict(self) -> dict[str, Any]:
        """Give plain data, as in the file."""
        return write_schema(self._values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_text(path, json.dumps(self.as_dict(), indent=1) + "\n")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Rebuild a plan from `as_dict` and check that it is whole.

        Args:
            data: Plain data, of this schema or the one before.

        Returns:
            The plan.

        Raises:
            PlanError: a field is missing, unknown or of the wrong type, the schema is another, the contents do not
                match the seal, or they ask for what no adapter can be.
        """
        return cls(**read_schema(data))

    def _values(self) -> dict[str, Any]:
        """Give the fields by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan and check that it is whole.

    Args:
        path: A file that `Plan.save` wrote.

    Returns:
        The plan, equal to the one saved.

    Raises:
        PlanError: the file is missing, is no plan, is of another schema, or was damaged or edited.
    """
    file = Path(path)
    if not file.is_file():
        raise PlanError(
            f"there is no plan {file}.", fix=f"make one with: apportion plan PROFILE --method NAME -o {file}"
        )
    data = read_json(
        file,
        lambda found: PlanError(f"the plan {file} is truncated or no JSON.", found=found, fix="plan again"),
    )
    try:
        return Plan.from_dict(data)
    except PlanError as error:
        raise error.within(f"the plan {file} cannot be used").adding(fix="plan again") from error
