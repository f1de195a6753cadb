"""LoRI's two phases: train all of B, keep its largest entries, restart and train only those."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from apportion.errors import ConfigurationError
from apportion.peft.attach import PhaseOptions, check_attachable
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

    First (D), all of B trains on the frozen A, in the subfolder ``dense``. Then the entries of B largest in magnitude
    are kept, as many as the plan counts, and written to ``mask.safetensors``. Last (S), training restarts from zero B
    on the same A and trains only the kept entries. Each phase can be resumed.

    Args:
        model: The base model; the adapters are attached to it.
        run: The run's plan, data, folder and settings. The settings are those of the second phase, except `sparse`. If
            the run has a mask, the first phase is skipped.

    Returns:
        The result of the second phase, or of the first one if it was interrupted.

    Raises:
        ConfigurationError: the mask does not fit the plan, or `resume` was set for a run with other settings.
        OutputExistsError: the folder is not empty and `resume` was not set.
        TrainingError: the loss is not finite.

    Source: LoRI, arXiv:2504.07448, LoRI-D and LoRI-S, and its released code.
    Differs: both phases draw the same A from the seed, so that the mask fits it (with `redraw_a` the second phase draws
        a new one, as the release does); by default the first phase has a tenth of the second's steps.
    """
    folder, settings, identity = run.folder, run.settings, run.identity()
    on_first(lambda: open_run(folder, identity, resume=run.resume))
    check_attachable(model, run.plan, mask=run.mask, seed=settings.seed)
    num_rows = len(check_rows(run.rows, run.tokenizer, settings.max_length).rows)
    unused = [name for name in settings.sparse.given if name != "store_a"]
    if run.mask is not None and unused:
        raise ConfigurationError(f"{', '.join(unused)} have no effect if a mask is given.", fix="leave them out")
    on_first(lambda: run.write(identity))
    run = replace(run, resume=True)
    base: Any = model
    if run.mask is not None:
        on_first(partial(run.mask.save, folder / MASK_FILE))
    elif not (folder / MASK_FILE).is_file():
        dense = _train_dense(base, run, num_rows)
        if dense.interrupted:
            return dense
        mask = extract_mask(dense.model, "default", run.plan, settings.sparse.mask_granularity)
        if settings.sparse.redraw_a:
            mask = replace(mask, a_checksum=None)
        on_first(partial(mask.save, folder / MASK_FILE))
        base = dense.model.unload()
    options = PhaseOptions(store_a=settings.sparse.store_a, on_top_of=run.on_top_of)
    return run_phase(base, run, identity, options, mask=load_mask(folder / MASK_FILE))


def _train_dense(model: Any, run: Run, num_rows: int) -> TrainResult:
    """Train all of B, in a subfolder of the run's folder."""
    seed = run.settings.seed + 1 if run.settings.sparse.redraw_a else run.settings.seed
    dense_run = replace(run, folder=run.folder / DENSE_FOLDER, settings=dense_settings(run.settings, num_rows))
    options = PhaseOptions(dense_b=True, on_top_of=run.on_top_of)
    return run_phase(model, dense_run, dense_run.identity(), options, seed=seed)


def dense_settings(settings: TrainSettings, num_rows: int) -> TrainSettings:
    """Return the first phase's settings.

    Args:
        settings: The second phase's settings.
        num_rows: Number of training rows.

    Returns:
        Settings with `dense_steps` and `dense_lr`. Their defaults are a tenth of the steps (at least 2, since the first
        one is warm-up) and a tenth of the learning rate.
    """
    batches = math.ceil(num_rows / (settings.batch_size * settings.gradient_accumulation * num_processes()))
    steps = settings.steps or math.ceil(settings.epochs * batches)
    return replace(
        settings,
        steps=settings.sparse.dense_steps or max(2, round(steps / 10)),
        lr=settings.sparse.dense_lr or settings.lr / 10,
    )
