"""LoRI's two phases: train all of B, keep its largest entries, start again and train those alone."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from apportion.errors import ConfigurationError
from apportion.peft.attach import check_attachable
from apportion.peft.masks import extract_mask
from apportion.records.mask import load_mask
from apportion.training.phase import run_phase
from apportion.training.processes import num_processes, on_first
from apportion.training.runs import Run, open_run
from apportion.training.settings import TrainSettings
from apportion.training.trainer import TrainResult, check_rows

MASK_FILE = "mask.safetensors"
DENSE_FOLDER = "dense"


def train_sparse(model: PreTrainedModel, run: Run) -> TrainResult:
    """Train a sparse plan.

    First (D) all of B trains on the frozen A, in the subfolder ``dense``. Then the largest entries of B by magnitude
    are kept, as many as the plan counts, and written to ``mask.safetensors``. Last (S) training starts again from B
    zero on the same A, with the kept entries alone. Each phase resumes.

    Args:
        model: The base model; it gets the adapters.
        run: What is trained, where and how. Its settings are the second phase's, but for the options of `sparse`. Its
            mask has the entries to train; the first phase is then left out.

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
    folder, settings, identity = run.folder, run.settings, run.identity()
    on_first(lambda: open_run(folder, identity, resume=run.resume))
    check_attachable(model, run.plan, mask=run.mask, seed=settings.seed)
    num_rows = len(check_rows(run.rows, run.tokenizer, settings.max_length).rows)
    unused = [name for name in settings.sparse.given if name != "store_a"]
    if run.mask is not None and unused:
        raise ConfigurationError(f"{', '.join(unused)} find a mask, and one was given.", fix="leave them out")
    on_first(lambda: run.write(identity))
    run = replace(run, resume=True)
    base: Any = model
    if run.mask is not None:
        on_first(partial(run.mask.save, folder / MASK_FILE))
    elif not (folder / MASK_FILE).is_file():
        dense = _train_dense(base, run, num_rows)
        if dense.interrupted:
            return dense
        found = extract_mask(dense.model, "default", run.plan, settings.sparse.mask_granularity)
        if settings.sparse.redraw_a:
            found = replace(found, a_checksum=None)
        on_first(partial(found.save, folder / MASK_FILE))
        base = dense.model.unload()
    attach = {"mask": load_mask(folder / MASK_FILE), "store_a": settings.sparse.store_a, **_below(run)}
    return run_phase(base, run, identity, attach)


def _train_dense(model: Any, run: Run, num_rows: int) -> TrainResult:
    """Train all of B, in a folder below the run's."""
    seed = run.settings.seed + 1 if run.settings.sparse.redraw_a else run.settings.seed
    phase = replace(run, folder=run.folder / DENSE_FOLDER, settings=dense_settings(run.settings, num_rows))
    return run_phase(model, phase, phase.identity(), {"dense_b": True, "seed": seed, **_below(run)})


def _below(run: Run) -> dict[str, Any]:
    """Say what the model was merged with before."""
    return {"on_top_of": (run.facts or {}).get("on_top_of")}


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
        steps=settings.sparse.dense_steps or max(2, round(steps / 10)),
        lr=settings.sparse.dense_lr or settings.lr / 10,
    )
