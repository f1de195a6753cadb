"""LoRI's two phases: train all of B, keep its largest entries, start again and train those alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apportion.data.sources import Row
from apportion.errors import ConfigurationError
from apportion.peft.attach import check_attachable
from apportion.peft.masks import extract_mask
from apportion.records.files import write_text
from apportion.records.mask import Mask, load_mask
from apportion.records.plan import Plan
from apportion.training.phase import run_phase
from apportion.training.processes import num_processes, on_first
from apportion.training.runs import RUN_FILE, open_run, run_identity
from apportion.training.settings import TrainSettings
from apportion.training.trainer import TrainResult, check_rows

MASK_FILE = "mask.safetensors"
DENSE_FOLDER = "dense"


def train_sparse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    rows: Sequence[Row],
    folder: Path,
    settings: TrainSettings,
    *,
    mask: Mask | None = None,
    resume: bool = False,
    progress: bool = True,
    facts: dict[str, Any] | None = None,
) -> TrainResult:
    """Train a sparse plan.

    First (D) all of B trains on the frozen A, in the subfolder ``dense``. Then the largest entries of B by magnitude
    are kept, as many as the plan counts, and written to ``mask.safetensors``. Last (S) training starts again from B
    zero on the same A, with the kept entries alone. Each phase resumes.

    Args:
        model: The base model; it gets the adapters.
        tokenizer: Its tokenizer.
        plan: The sparse plan.
        rows: Training rows, the same for both phases.
        folder: Folder for everything.
        settings: Settings of the second phase; `dense_steps` and `dense_lr` are the first one's.
        mask: The entries to train; the first phase is then left out.
        resume: Go on in a folder that the same run has left; begin if it is empty.
        progress: Show a bar on standard error.
        facts: More facts to keep in the folder.

    Returns:
        What the second phase did, or the first one where it was interrupted.

    Raises:
        ConfigurationError: the mask does not fit the plan, or `resume` was asked for a run of other settings.
        OutputExistsError: the folder has something in it and `resume` was not asked for.
        TrainingError: the loss is not a number.

    Source: LoRI, arXiv:2504.07448, LoRI-D and LoRI-S, and its released code.
    Differs: A is drawn from the seed and the same in both phases, so that the mask fits it (`redraw_a` draws another
        one for the second phase, as the release does); the first phase has a tenth of the second's steps by default.
    """
    identity = run_identity(plan, rows, settings, facts, mask)
    on_first(lambda: open_run(folder, identity, resume=resume))
    check_attachable(model, plan, mask=mask, seed=settings.seed)
    num_rows = len(check_rows(rows, tokenizer, settings.max_length).rows)
    unused = [name for name in settings.of_sparse_plans() if name != "store_a"]
    if mask is not None and unused:
        raise ConfigurationError(f"{', '.join(unused)} find a mask, and one was given.", fix="leave them out")
    run = {"identity": identity, "settings": settings.as_dict(), **(facts or {})}
    on_first(lambda: write_text(folder / RUN_FILE, json.dumps(run, indent=1) + "\n"))
    common: dict[str, Any] = {"resume": True, "progress": progress, "facts": facts}
    below = {"on_top_of": (facts or {}).get("on_top_of")}
    base: Any = model
    attach: dict[str, Any]
    if mask is None and not (folder / MASK_FILE).is_file():
        seed = settings.seed + 1 if settings.redraw_a else settings.seed
        attach = {"dense_b": True, "seed": seed, **below}
        first = dense_settings(settings, num_rows)
        own = run_identity(plan, rows, first, facts)
        target = folder / DENSE_FOLDER
        dense = run_phase(base, tokenizer, plan, rows, target, first, identity=own, attach=attach, **common)
        if dense.interrupted:
            return dense
        found = extract_mask(dense.model, "default", plan, settings.mask_granularity)
        if settings.redraw_a:
            found = replace(found, a_checksum=None)
        on_first(partial(found.save, folder / MASK_FILE))
        base = dense.model.unload()
    elif mask is not None:
        on_first(partial(mask.save, folder / MASK_FILE))
    attach = {"mask": load_mask(folder / MASK_FILE), "store_a": settings.store_a, **below}
    return run_phase(base, tokenizer, plan, rows, folder, settings, identity=identity, attach=attach, **common)


def dense_settings(settings: TrainSettings, num_rows: int) -> TrainSettings:
    """Give the first phase's settings.

    Args:
        settings: The second phase's.
        num_rows: Training rows.

    Returns:
        A tenth of the steps, at least 2 since the first one warms up, and a tenth of the learning rate, where nothing
        else was asked for.
    """
    batches = math.ceil(num_rows / (settings.batch_size * settings.gradient_accumulation * num_processes()))
    steps = settings.steps or math.ceil(settings.epochs * batches)
    return replace(
        settings,
        steps=settings.dense_steps or max(2, round(steps / 10)),
        lr=settings.dense_lr or settings.lr / 10,
    )
