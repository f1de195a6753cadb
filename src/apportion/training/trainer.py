"""TRL's `SFTTrainer` with this package's settings. It stops at non-finite numbers and on signals, and calls hooks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from datasets import Dataset
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
)
from transformers.training_args import TrainingArguments

from apportion.compat.trl import CheckpointingTrainer
from apportion.data.batches import TrainableRows
from apportion.data.sources import Row
from apportion.errors import TrainingError
from apportion.peft.state import non_finite
from apportion.records.files import naming_output
from apportion.records.plan import Plan
from apportion.training.checkpoints import CHECKPOINTS, last_checkpoint, seal_checkpoint, unseal_checkpoint
from apportion.training.interrupts import StopOnSignal
from apportion.training.procedures.base import TrainingHooks
from apportion.training.procedures.callback import StepHooks
from apportion.training.procedures.groups import join
from apportion.training.procedures.plans import record_plan
from apportion.training.processes import largest, on_first, wait_for_all
from apportion.training.result import TrainResult
from apportion.training.settings import TrainSettings
from apportion.training.surroundings import arguments, config_restored, deterministic, quiet, warn_of_small_caches

STATE_FILE = "procedure.safetensors"
ADAPTER_NAME = "default"


@dataclass(frozen=True)
class Session:
    """One call of the trainer.

    Args:
        tokenizer: The model's tokenizer.
        checked: Training rows, as `check_rows` returns them.
        folder: Folder for checkpoints.
        settings: Settings of the run.
        plan: The plan that the run began with; None if no adapter is trained.
        checkpoint: Checkpoint to resume from.
        progress: Show a progress bar on standard error.
    """

    tokenizer: PreTrainedTokenizerBase
    checked: TrainableRows
    folder: Path
    settings: TrainSettings
    plan: Plan | None = None
    checkpoint: Path | None = None
    progress: bool = True


def fit(model: PreTrainedModel | PeftModel, session: Session, hooks: TrainingHooks) -> TrainResult:
    """Train the weights of a model that require a gradient.

    Args:
        model: The model, with adapters attached if adapters are trained.
        session: Data, settings and folder.
        hooks: What is done beside training. Unless a signal ended the run, they finish the adapter.

    Returns:
        The trained model and the run's figures.

    Raises:
        TrainingError: the loss, a weight or its optimizer state is not finite.
    """
    settings, tokenizer = session.settings, session.tokenizer
    warn_of_small_caches(model, settings)
    stop = StopOnSignal()
    with config_restored(model), quiet(tokenizer), deterministic():
        trainer = _Trainer(
            session,
            hooks,
            model=model,
            args=arguments(session.folder / CHECKPOINTS, settings, progress=session.progress),
            train_dataset=Dataset.from_list([_without_answer(row) for row in session.checked.rows]),
            processing_class=tokenizer,
            callbacks=[stop],
        )
        start = time.perf_counter()
        try:
            with stop.listening():
                trainer.train_from(session.checkpoint)
            trainer.refuse_non_finite()
            signal = largest(stop.signal)
            if not signal:
                trainer.record(hooks.finish())
        finally:
            hooks.detach()
        seconds = time.perf_counter() - start
    return trainer.result(seconds, session.checked, signal)


class _Trainer(CheckpointingTrainer):
    """TRL's trainer with hooks, stopped by the first non-finite loss or weight."""

    tokens_before = 0
    num_joined = 0

    def __init__(self, session: Session, hooks: TrainingHooks, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.session, self.hooks = session, hooks
        self.add_callback(StepHooks(hooks, self._join_groups))
        self.remove_callback(PrinterCallback)  # these two write the logs to standard output
        self.remove_callback(ProgressCallback)
        if session.progress:
            self.add_callback(_Bar())

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end, from the beginning or from a checkpoint.

        Nothing is trained if the checkpoint is that of the last step: transformers would do one step too many.
        """
        if checkpoint is None:
            self.train()
            return
        before = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.tokens_before = int(before.num_input_tokens_seen)
        if before.global_step < before.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint))
        else:
            set_peft_model_state_dict(self.model, load_peft_weights(str(checkpoint), device="cpu"))
            self.state = before
            self._attach_hooks()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer. The weights are loaded by now, so the hooks are attached first."""
        if self.optimizer is None:
            self._attach_hooks()
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Create the schedule, and add the groups born before the checkpoint, whose states are loaded next."""
        scheduler: LRScheduler = super().create_scheduler(num_training_steps, optimizer)
        self._join_groups()
        return scheduler

    def _attach_hooks(self) -> None:
        """Attach the hooks, and restore their state from the checkpoint, if any."""
        self.hooks.attach(self.model, ADAPTER_NAME, num_steps=self.state.max_steps, seed=self.session.settings.seed)
        if self.session.checkpoint is not None:
            file = self.session.checkpoint / STATE_FILE
            self.hooks.restore(load_file(file) if file.is_file() else {})

    def _join_groups(self) -> None:
        """Add the groups that were born since the last call."""
        num_steps = self.state.max_steps
        warmup_steps = self.args.get_warmup_steps(num_steps)
        for group in self.hooks.groups()[self.num_joined :]:
            join(group, self.optimizer, self.lr_scheduler, warmup_steps=warmup_steps, num_steps=num_steps)
            self.num_joined += 1

    def record(self, plan: Plan | None) -> None:
        """Write a changed plan to the adapter's configuration."""
        if plan is not None and self.session.plan is not None:
            record_plan(self.model, ADAPTER_NAME, plan, self.session.plan)

    def result(self, seconds: float, checked: TrainableRows, signal: int) -> TrainResult:
        """Return the run's figures."""
        tokens = int(self.state.num_input_tokens_seen)
        losses = [{"step": e["step"], "loss": float(e["loss"])} for e in self.state.log_history if "loss" in e]
        return TrainResult(
            model=self.model,
            steps=self.state.global_step,
            loss=sum(entry["loss"] for entry in losses) / len(losses),
            tokens=tokens,
            seconds=seconds,
            tokens_per_s=(tokens - self.tokens_before) / seconds,
            truncated=checked.truncated,
            signal=signal,
            loss_curve=tuple(losses),
            left_out=checked.left_out,
        )

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Add the hooks' penalty, if any."""
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self.hooks.before_forward(inputs)
        result = super().compute_loss(model, inputs, *args, **kwargs)
        penalty = self.hooks.penalty()
        if penalty is None:
            return result
        loss, *outputs = result if isinstance(result, tuple) else (result,)
        penalty = self.added_once(penalty.to(loss.device), kwargs.get("num_items_in_batch"))
        return (loss + penalty, *outputs) if outputs else loss + penalty

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one step and check its loss."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        value = float(loss)
        if largest(int(not math.isfinite(value))):
            problem = value if not math.isfinite(value) else "not finite on another process"
            self._stop(f"the loss became {problem} at step {self.state.global_step + 1}")
        return loss

    @contextmanager
    def around_checkpoint(self, folder: Path) -> Iterator[None]:
        """Stop if a number is not finite; write this step's plan and the hooks' state, and then the manifest."""
        self.refuse_non_finite()
        with naming_output(folder, left=f"an incomplete {folder.name}, which is removed when the run is resumed"):
            on_first(lambda: unseal_checkpoint(folder))
            self.record(self.hooks.plan_now())
            yield
            state = self.hooks.state()
            wait_for_all()
            on_first(lambda: _write_state(folder, state))
            on_first(lambda: seal_checkpoint(folder))

    def refuse_non_finite(self) -> None:
        """Stop if a trainable weight or its optimizer state is not finite on any process."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        names = non_finite(trained)
        if not names and self.optimizer is not None:
            states = self.optimizer.state
            names = [
                f"the optimizer's state of {name}"
                for name, parameter in trained.items()
                if non_finite({key: v for key, v in states.get(parameter, {}).items() if isinstance(v, torch.Tensor)})
            ]
        if largest(len(names)):
            self._stop(f"{names[0] if names else 'a weight of another process'} was not finite after step "
                       f"{self.state.global_step}")  # fmt: skip

    def _stop(self, reason: str) -> NoReturn:
        """Raise an error that names the last good checkpoint."""
        try:
            last = last_checkpoint(Path(self.args.output_dir))
        except TrainingError as error:  # the checkpoint was changed meanwhile; report the reason to stop first
            raise TrainingError(f"{reason}; training stopped.", found=error.what) from error
        checkpoint = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
        raise TrainingError(
            f"{reason}; training stopped.",
            found=checkpoint,
            fix="lower the learning rate, or check the rows near this step",
        )


class _Bar(ProgressCallback):
    """A progress bar on standard error that shows the latest figures. transformers prints them on standard output."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the latest figures."""
        logs = kwargs.get("logs", {})
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=logs["loss"], lr=logs["learning_rate"])


def _write_state(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write the hooks' state into a checkpoint, if they have one."""
    if state:
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
        save_file(tensors, folder / STATE_FILE)


def _without_answer(row: Row) -> Row:
    """Drop the column that training does not use."""
    return {name: value for name, value in row.items() if name != "answer"}
