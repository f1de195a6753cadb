"""`profile`: measure a model on the batches of one or several tasks."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, cast, get_args

import torch
import transformers
from torch import Tensor, nn

from apportion._version import __version__
from apportion.discovery import base_model, execution_device, find_sites
from apportion.errors import ConfigurationError, DataError, ProfileError
from apportion.profiling.block_coordinate import block_coordinate_meter
from apportion.profiling.routing import Batch, RunBatch, routing_counter
from apportion.profiling.sensitivity import gradient_meter
from apportion.profiling.totals import PartialFile, TaskTotals
from apportion.records.files import seal
from apportion.records.profile import Profile
from apportion.records.site import Layout

SensitivityProcedure = Literal["one-pass", "block-coordinate"]
Meter = Callable[[nn.Module, Layout, TaskTotals], AbstractContextManager[RunBatch]]

_METERS: dict[SensitivityProcedure | None, Meter] = {
    None: routing_counter,
    "one-pass": gradient_meter,
    "block-coordinate": block_coordinate_meter,
}


def profile(
    model: nn.Module,
    batches: Iterable[Batch] | Mapping[str, Iterable[Batch]],
    *,
    task: str = "default",
    sensitivity: bool | SensitivityProcedure = False,
    provenance: dict[str, Any] | None = None,
    partial: str | os.PathLike[str] | None = None,
    keep_partial: bool = False,
) -> Profile:
    """Measure where a model routes the tokens of the data and, optionally, the gradient norms of its matrices.

    Selections are counted at the experts' inputs, so they are correct for every kind of router: softmax, sigmoid with
    a correction bias, group-limited. The sensitivity of a site is the squared Frobenius norm of a sample's gradient,
    summed over samples. A sample's loss is the mean over its labelled tokens. The model is unchanged afterwards. If
    `torch.distributed` is initialised, totals are summed over all processes, so that each process may pass its own
    share of every task's batches.

    Args:
        model: A Mixture-of-Experts model, or a dense one, which has no routing.
        batches: Dictionaries that the model accepts (``input_ids``, ``attention_mask``; ``labels`` for sensitivity), or
            one such iterable per task.
        task: The task's name if `batches` is a single iterable.
        sensitivity: Measure gradients too. True or ``one-pass`` uses frozen weights; ``block-coordinate`` follows the
            released code of LoRA-SMoE, for comparison.
        provenance: Facts to store with the numbers, such as the data's name. Versions are added.
        partial: File for the totals during the measurement. After a crash, a call with the same model, tasks, batches
            and provenance resumes from it. A damaged file is ignored with a warning. The file is removed at the end.
        keep_partial: Keep that file at the end, until the caller has saved the profile and calls `remove_partial`.
            Until then, the same call returns the same profile without running the model again.

    Returns:
        The profile. Plans can be made from it without the model.

    Raises:
        ConfigurationError: `sensitivity` is not a known procedure.
        DataError: a task has no batch or no token, or no labels although sensitivity needs them.
        ProfileError: a task's loss is not finite, or its gradient is zero everywhere.

    Cost: one forward pass over the data; with sensitivity, one forward and one backward pass.

    Source: HELLoRA, arXiv:2605.18795, expert selection by routing frequency; LoRA-SMoE, arXiv:2505.06272, sensitivity.
    Differs: counts are forward-only, on the frozen model (the paper counts in a short LoRA warm-up and reports that a
        forward-only count gives nearly the same set); for sensitivities see `gradient_meter`.
    """
    procedure = _procedure(sensitivity)
    tasks = cast("Mapping[str, Iterable[Batch]]", batches if isinstance(batches, Mapping) else {task: batches})
    if not tasks:
        raise DataError("there is no task to profile.", fix="give at least one data set")
    layout = find_sites(model)
    facts = {"tasks": list(tasks), "sensitivity": procedure, "provenance": provenance or {}}
    file = PartialFile(
        None if procedure == "block-coordinate" else partial, seal(facts | {"model": weights_sample(model, layout)})
    )
    measured = file.read(layout)
    for name, part in tasks.items():
        totals = measured.setdefault(name, TaskTotals.zeros(layout))
        try:
            _measure(model, layout, part, totals, procedure, lambda *, now=False: file.keep(lambda: measured, now=now))
        except (DataError, ProfileError) as error:
            raise error.within(f"task {name!r}") from error
    device = execution_device(model)
    for name, totals in measured.items():
        sites = [site.name for site in layout.sites() if site.storage != "weight"] if procedure else []
        totals.sum_over_processes(device, sites)
        _check(name, totals, layout, sensitive=procedure is not None)
    if file.path is not None and not keep_partial:
        file.path.unlink(missing_ok=True)
    return Profile(
        layout=layout,
        counts={name: totals.counts for name, totals in measured.items()},
        routing_mass={name: totals.mass for name, totals in measured.items()},
        tokens={name: totals.tokens for name, totals in measured.items()},
        sensitivity={name: totals.sensitivity for name, totals in measured.items() if totals.sensitivity},
        provenance={
            "sequences": {name: totals.sequences for name, totals in measured.items()},
            "sensitivity_procedure": procedure,
            "versions": {
                "apportion": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            **(provenance or {}),
        },
    )


def weights_sample(model: nn.Module, layout: Layout) -> str:
    """Hash the architecture, and the type and first numbers of every weight, to identify the weights."""
    total = hashlib.sha256(layout.fingerprint.encode())
    for name, parameter in base_model(model).named_parameters():
        for stored in _stored_tensors(parameter):
            total.update(f"{name}|{stored.dtype}".encode())
            if not stored.is_meta:  # offloaded weights contribute only their name and type
                total.update(stored.detach().reshape(-1)[:8].float().cpu().numpy().tobytes())
    return total.hexdigest()


def _stored_tensors(parameter: Any) -> Iterator[Tensor]:
    """Return a tensor, or those that a tensor of a quantiser's class is stored in."""
    flatten = getattr(parameter, "__tensor_flatten__", None)
    if flatten is None:
        yield parameter
        return
    for name in flatten()[0]:
        yield from _stored_tensors(getattr(parameter, name))


def _chained(before: str, batch: Batch) -> str:
    """Hash a batch together with those before it."""
    total = hashlib.sha256(before.encode())
    for name in ("input_ids", "attention_mask", "labels"):
        if isinstance(batch.get(name), torch.Tensor):
            total.update(batch[name].cpu().numpy().tobytes())
    return total.hexdigest()


def _procedure(sensitivity: SensitivityProcedure | bool) -> SensitivityProcedure | None:  # noqa: FBT001
    """Return the procedure, or None for no sensitivity."""
    if isinstance(sensitivity, bool):
        return "one-pass" if sensitivity else None
    if sensitivity not in get_args(SensitivityProcedure):
        known = ", ".join(get_args(SensitivityProcedure))
        raise ConfigurationError(f"there is no procedure {sensitivity!r}.", fix=f"choose among {known}")
    return sensitivity


def _measure(
    model: nn.Module,
    layout: Layout,
    batches: Iterable[Batch],
    totals: TaskTotals,
    procedure: SensitivityProcedure | None,
    keep: Callable[..., None],
) -> None:
    """Run one task's batches, except those measured before an interruption."""
    done = totals.batches
    with _METERS[procedure](model, layout, totals) as run_batch:
        seen = ""
        for number, batch in enumerate(batches):
            seen = _chained(seen, batch)
            if number >= done:
                run_batch(batch)
                totals.batches, totals.seen = number + 1, seen
                keep()
            elif number + 1 == done and seen != totals.seen:
                raise DataError(
                    "the batches are not those that the measurement was started with.",
                    fix="remove the file of partial totals, and measure again",
                )
    keep(now=True)


def _check(task: str, totals: TaskTotals, layout: Layout, *, sensitive: bool) -> None:
    """Raise an error if no plan can be made from the totals."""
    if totals.tokens == 0:
        raise DataError(
            f"there is nothing to profile: the data of task {task!r} have no token.",
            fix="give at least one row of text",
        )
    unmeasured = [s.name for s in layout.sites() if s.storage != "weight" and s.name not in totals.sensitivity]
    if sensitive and unmeasured:
        raise ProfileError(
            f"task {task!r} has {totals.sequences} rows, too few to measure every layer: block-coordinate needs "
            "one row per layer.",
            details={"first": f"{unmeasured[0]} was not measured"},
            fix="give at least one row per layer",
        )
    if sensitive and not any(value > 0 for value in totals.sensitivity.values()):
        raise ProfileError(
            f"the gradient of task {task!r} is zero everywhere.",
            fix="check its completions, or leave the task out",
        )
