"""`profile`: measure a model on one task's batches or on several tasks' batches."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import transformers
from torch import nn

from apportion._version import __version__
from apportion.discovery import find_sites
from apportion.errors import ConfigurationError, DataError
from apportion.profiling.routing import Batch, count_routing
from apportion.records.profile import Profile


def profile(
    model: nn.Module,
    batches: Iterable[Batch] | Mapping[str, Iterable[Batch]],
    *,
    task: str = "default",
    sensitivity: bool = False,
    provenance: dict[str, Any] | None = None,
) -> Profile:
    """Measure where a model routes the tokens of the user's data.

    Counts are taken where the experts are called, so they are right for every router: softmax, sigmoid with a
    correction bias, group-limited. Nothing about the model is different afterwards.

    Args:
        model: A Mixture-of-Experts model; dense models have no routing, but their sites are recorded all the same.
        batches: Dictionaries that the model accepts (``input_ids``, ``attention_mask``), or one such iterable a task.
        task: The task's name where `batches` is a single iterable.
        sensitivity: Not available in this version.
        provenance: Facts to keep with the numbers, such as the data's name; versions are added.

    Returns:
        The profile, which a plan can be made from without the model.

    Raises:
        ConfigurationError: `sensitivity` was asked for.
        DataError: a task has no batch or no token.

    Cost: one forward pass over the data, without gradients.

    Source: HELLoRA, arXiv:2605.18795, expert selection by routing frequency.
    Differs: counts are taken forward-only on the frozen model (the paper counts in a short LoRA warm-up and reports
        that a forward-only count gives nearly the same set).
    """
    if sensitivity:
        raise ConfigurationError(
            "gradient sensitivity is not available in this version.\n  fix:  leave out --sensitivity"
        )
    tasks = batches if isinstance(batches, Mapping) else {task: batches}
    if not tasks:
        raise DataError("there is no task to profile.\n  fix:  give at least one data set")
    layout = find_sites(model)
    measured = {name: count_routing(model, layout, cast("Iterable[Batch]", part)) for name, part in tasks.items()}
    return Profile(
        layout=layout,
        counts={name: totals.counts for name, totals in measured.items()},
        routing_mass={name: totals.mass for name, totals in measured.items()},
        tokens={name: totals.tokens for name, totals in measured.items()},
        provenance={
            "sequences": {name: totals.sequences for name, totals in measured.items()},
            "versions": {
                "apportion": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            **(provenance or {}),
        },
    )
