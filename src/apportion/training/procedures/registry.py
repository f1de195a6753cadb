"""The table of procedures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from apportion.errors import PlanError, shortened
from apportion.records.names import nearest
from apportion.records.options import read_options
from apportion.records.plan import LORI, PLAIN, Plan
from apportion.training.procedures.base import Procedure
from apportion.training.procedures.lori import Lori
from apportion.training.procedures.plain import Plain

AnyProcedure = TypeVar("AnyProcedure", bound=type[Procedure])

PROCEDURES: dict[str, type[Procedure]] = {PLAIN: Plain, LORI: Lori}


def register_procedure(name: str) -> Callable[[AnyProcedure], AnyProcedure]:
    """Make a procedure known under the name that plans have in `Plan.procedure`.

    Args:
        name: The name.

    Returns:
        A decorator for the procedure's class.
    """

    def register(procedure: AnyProcedure) -> AnyProcedure:
        if PROCEDURES.setdefault(name, procedure) is not procedure:
            raise ValueError(f"there is a procedure {name!r} already.")
        return procedure

    return register


def find_procedure(plan: Plan) -> Procedure:
    """Return the procedure that a plan is trained by.

    Args:
        plan: The plan.

    Returns:
        A new procedure for one run.

    Raises:
        PlanError: no procedure has the plan's name.
        ConfigurationError: an option in the plan is unknown or wrong.
    """
    name, values = plan.procedure["name"], {key: value for key, value in plan.procedure.items() if key != "name"}
    if name not in PROCEDURES:
        known = nearest(name, PROCEDURES)
        near = f"did you mean {known}? Otherwise " if known else ""
        raise PlanError(
            f"the plan is trained by the procedure {shortened(name)!r}, which is not known here.",
            expected=f"one of {', '.join(PROCEDURES)}",
            fix=f"{near}import the module that registers it, or install the version that made the plan",
        )
    procedure = PROCEDURES[name]
    return procedure(plan, read_options(procedure.option_model, values, f"procedure {name}"))
