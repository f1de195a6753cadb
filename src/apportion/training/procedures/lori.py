"""LoRI's two phases: train all of B, keep its largest entries, restart and train only those."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from transformers import PreTrainedModel

from apportion.errors import ConfigurationError, PlanError
from apportion.peft.attach import PhaseOptions, check_attachable
from apportion.peft.masks import extract_mask
from apportion.records.mask import load_mask
from apportion.records.options import Options, SparseTraining
from apportion.training.checked_rows import check_rows
from apportion.training.procedures.base import Phase, Procedure, TrainPhase
from apportion.training.processes import num_processes, on_first
from apportion.training.result import TrainResult
from apportion.training.runs import Run, open_run
from apportion.training.settings import TrainSettings

MASK_FILE = "mask.safetensors"
DENSE_FOLDER = "dense"


class Lori(Procedure):
    """Train a sparse plan in two phases, each of which can be resumed.

    First (D), all of B trains on the frozen A, in the subfolder ``dense``. Then the entries of B largest in magnitude
    are kept, as many as the plan counts, and written to ``mask.safetensors``. Last (S), training restarts from zero B
    on the same A and trains only the kept entries.

    Options are those of `SparseTraining`. Those of the run's settings replace those of the plan.

    Source: LoRI, arXiv:2504.07448, LoRI-D and LoRI-S, and its released code.
    Differs: both phases draw the same A from the seed, so that the mask fits it (with `redraw_a` the second phase draws
        a new one, as the release does); by default the first phase has a tenth of the second's steps.
    """

    option_model: ClassVar[type[Options]] = SparseTraining

    def check(self, run: Run) -> None:
        """Check that the plan is sparse.

        Args:
            run: The run.

        Raises:
            PlanError: it is not.
        """
        if not self.plan.is_sparse:
            raise PlanError(
                "the procedure 'lori' trains sparse plans, but the plan is not sparse.",
                fix="plan again with lori or hellori",
            )

    def train(self, model: PreTrainedModel, run: Run, train_phase: TrainPhase) -> TrainResult:
        """Train both phases, or only the second one if the run has a mask.

        Args:
            model: The base model; the adapters are attached to it.
            run: The run. Its settings are those of the second phase.
            train_phase: Trains a phase.

        Returns:
            The result of the second phase, or of the first one if it was interrupted.

        Raises:
            ConfigurationError: the mask does not fit the plan, or options of the first phase were given beside a mask.
        """
        identity = run.identity()
        run = replace(run, settings=replace(run.settings, sparse=self._sparse_options(run.settings)))
        folder, settings = run.folder, run.settings
        on_first(lambda: open_run(folder, identity, resume=run.resume))
        check_attachable(model, run.plan, mask=run.mask, seed=settings.seed)
        num_rows = len(check_rows(run.rows, run.tokenizer, settings.max_length).rows)
        unused = [name for name in settings.sparse.given if name != "store_a"]
        if run.mask is not None and unused:
            raise ConfigurationError(f"{', '.join(unused)} have no effect if a mask is given.", fix="leave them out")
        on_first(partial(run.write, identity))
        run = replace(run, resume=True)
        base: Any = model
        if run.mask is not None:
            on_first(partial(run.mask.save, folder / MASK_FILE))
        elif not (folder / MASK_FILE).is_file():
            dense = train_phase(model, self._dense_phase(run, num_rows))
            if dense.interrupted:
                return dense
            base = self._extract_mask(dense, run)
        options = PhaseOptions(store_a=settings.sparse.store_a, on_top_of=run.on_top_of)
        return train_phase(base, Phase(run, self, identity, options, mask=load_mask(folder / MASK_FILE)))

    def _sparse_options(self, settings: TrainSettings) -> SparseTraining:
        """Return the plan's options, replaced by those that were given in the settings."""
        if not self.options.given:
            return settings.sparse
        both = (self.options, settings.sparse)
        return SparseTraining(**{name: getattr(options, name) for options in both for name in options.given})

    def _dense_phase(self, run: Run, num_rows: int) -> Phase:
        """Return the phase that trains all of B, in a subfolder of the run's folder."""
        seed = run.settings.seed + 1 if run.settings.sparse.redraw_a else run.settings.seed
        dense_run = replace(run, folder=run.folder / DENSE_FOLDER, settings=dense_settings(run.settings, num_rows))
        options = PhaseOptions(dense_b=True, on_top_of=run.on_top_of)
        return Phase(dense_run, self, dense_run.identity(), options, seed=seed)

    def _extract_mask(self, dense: TrainResult, run: Run) -> Any:
        """Write the mask of the first phase's adapter, and return the model without it."""
        mask = extract_mask(dense.model, "default", run.plan, run.settings.sparse.mask_granularity)
        if run.settings.sparse.redraw_a:
            mask = replace(mask, a_checksum=None)
        on_first(partial(mask.save, run.folder / MASK_FILE))
        return dense.model.unload()


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
