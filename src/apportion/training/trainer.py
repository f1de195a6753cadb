"""TRL's `SFTTrainer` with this package's settings. It stops at non-finite numbers and on signals."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
from datasets import Dataset
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
)
from transformers.training_args import TrainingArguments
from trl import SFTConfig, SFTTrainer

from apportion.cpu_caches import CPU_CACHES
from apportion.data.batches import TrainableRows, trainable_rows
from apportion.data.sources import Row
from apportion.errors import ApportionWarning, DataError, TrainingError, lay_out
from apportion.peft.state import non_finite
from apportion.training.balance import BalanceLoss
from apportion.training.checkpoints import CHECKPOINTS, last_checkpoint, seal_checkpoint, unseal_checkpoint
from apportion.training.interrupts import StopOnSignal
from apportion.training.processes import largest, on_first, wait_for_all
from apportion.training.settings import TrainSettings


@dataclass(frozen=True)
class TrainResult:
    """The trained model and the figures of a run.

    Args:
        model: The trained model.
        steps: Number of optimizer steps.
        loss: Mean training loss over the run.
        tokens: Tokens trained on, over all steps.
        seconds: Wall time since the run was started or last resumed.
        tokens_per_s: Tokens per second in that time.
        truncated: Number of rows truncated to `max_length`.
        signal: Number of the signal that ended the run early, after a checkpoint; 0 if none did.
        loss_curve: Steps and their training losses.
        left_out: Number of rows skipped because no completion token is within `max_length`.
    """

    model: PreTrainedModel | PeftModel
    steps: int
    loss: float
    tokens: int
    seconds: float
    tokens_per_s: float
    truncated: int
    signal: int
    loss_curve: tuple[dict[str, float], ...]
    left_out: int = 0

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run early."""
        return self.signal != 0

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        excluded = ("model", "loss_curve", "signal")
        figures = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in excluded}
        return figures | {"interrupted": self.interrupted}


def check_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TrainableRows:
    """Check that rows can be trained on.

    All rows must have one format, because the trainer reads them all in the format of the first one. Rows without a
    completion token within `max_length` are skipped with a warning.

    Args:
        rows: Training rows.
        tokenizer: The model's tokenizer.
        max_length: Maximum number of tokens per row.

    Returns:
        The rows to train on.

    Raises:
        DataError: the rows have several formats, no row has a completion token within `max_length`, a row has no token,
            or the tokenizer has no chat template for messages.
    """
    trainable = trainable_rows(rows, tokenizer, max_length)
    formats = {
        "text" if "text" in row else "text prompts" if isinstance(row["prompt"], str) else "messages" for row in rows
    }
    if len(formats) > 1:
        raise DataError(
            f"the rows have several formats: {' and '.join(sorted(formats))}.", fix="convert all tasks to one format"
        )
    if trainable.left_out:
        warnings.warn(
            lay_out(f"{trainable.left_out_message(max_length)} and were left out.", {"fix": "raise --max-length"}),
            ApportionWarning,
            stacklevel=3,
        )
    return trainable


def fit(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    checked: TrainableRows,
    folder: Path,
    settings: TrainSettings,
    *,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train the weights of a model that require a gradient.

    Args:
        model: The model, with adapters attached if adapters are trained.
        tokenizer: Its tokenizer.
        checked: Training rows, as `check_rows` returns them.
        folder: Folder for checkpoints.
        settings: Settings of the run.
        checkpoint: Checkpoint to resume from.
        progress: Show a progress bar on standard error.

    Returns:
        The trained model and the run's figures.

    Raises:
        TrainingError: the loss, a weight or its optimizer state is not finite.
    """
    _warn_of_small_caches(model, settings)
    balance = BalanceLoss(model) if settings.balance_loss else None
    stop = StopOnSignal()
    with _config_restored(model), _quiet(tokenizer), _deterministic():
        trainer = _Trainer(
            model=model,
            args=_arguments(folder / CHECKPOINTS, settings, progress=progress),
            train_dataset=Dataset.from_list([_without_answer(row) for row in checked.rows]),
            processing_class=tokenizer,
            callbacks=[stop],
        )
        trainer.balance, trainer.balance_weight = balance, settings.balance_loss
        trainer.remove_callback(PrinterCallback)  # these two write the logs to standard output
        trainer.remove_callback(ProgressCallback)
        if progress:
            trainer.add_callback(_Bar())
        start = time.perf_counter()
        try:
            with stop.listening():
                trainer.train_from(checkpoint)
            trainer.refuse_non_finite()
        finally:
            if balance is not None:
                balance.end()
        seconds = time.perf_counter() - start
    return trainer.result(seconds, checked, largest(stop.signal))


class _Trainer(SFTTrainer):
    """TRL's trainer, stopped by the first non-finite loss or weight."""

    tokens_before = 0
    balance: BalanceLoss | None = None
    balance_weight = 0.0

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
        """Add the balance loss, if any."""
        if self.balance is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self.balance.begin(inputs.get("attention_mask"))
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss, *outputs = result if isinstance(result, tuple) else (result,)
        balance_loss = self.balance.loss().to(loss.device) * self.balance_weight
        if (
            self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
        ):  # in this case transformers does not divide by the number of accumulated batches
            balance_loss = balance_loss / self.current_gradient_accumulation_steps
        return (loss + balance_loss, *outputs) if outputs else loss + balance_loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one step and check its loss."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        value = float(loss)
        if largest(int(not math.isfinite(value))):
            problem = value if not math.isfinite(value) else "not finite on another process"
            self._stop(f"the loss became {problem} at step {self.state.global_step + 1}")
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint if all numbers are finite, then its manifest once all processes are done."""
        self.refuse_non_finite()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        on_first(lambda: unseal_checkpoint(folder))
        super()._save_checkpoint(model, trial)
        wait_for_all()
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


def _arguments(folder: Path, settings: TrainSettings, *, progress: bool) -> SFTConfig:
    """Convert the settings to TRL's."""
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.steps if settings.steps is not None else -1,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_frac,  # values below 1 are a fraction of all steps
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        router_aux_loss_coef=settings.router_aux_loss,
        max_length=settings.max_length,
        bf16=settings.bf16,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        save_total_limit=2,
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=not progress,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _warn_of_small_caches(model: PreTrainedModel | PeftModel, settings: TrainSettings) -> None:
    """Warn if oneDNN's primitive caches are too small for batches of many lengths."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    missing = [f"{name}={value}" for name, value in CPU_CACHES.items() if name not in os.environ]
    if missing and not torch.cuda.is_available() and (settings.bf16 or base.dtype == torch.bfloat16):
        warnings.warn(
            "bfloat16 on a CPU is slow with batches of many lengths, because PyTorch's caches of prepared matrix "
            f"products are too small. For speed, set {' and '.join(missing)} before Python starts.",
            ApportionWarning,
            stacklevel=3,
        )


def _without_answer(row: Row) -> Row:
    """Drop the column that training does not use."""
    return {name: value for name, value in row.items() if name != "answer"}


@contextmanager
def _config_restored(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Restore the settings of the model's configuration that the trainer changes."""
    config = (model.get_base_model() if isinstance(model, PeftModel) else model).config.get_text_config()
    names = ("output_router_logits", "router_aux_loss_coef", "use_cache")
    before = {name: getattr(config, name) for name in names if hasattr(config, name)}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Use PyTorch's deterministic algorithms where they exist, so that equal runs give equal weights."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags: Any = torch.utils.deterministic
    fill_before = flags.fill_uninitialized_memory
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    flags.fill_uninitialized_memory = False  # a debugging aid that takes about a third of the time
    try:
        yield
    finally:
        flags.fill_uninitialized_memory = fill_before
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _quiet(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Hide datasets' progress bars, disable tokenizer threads, and restore the tokenizer's padding side."""
    side = tokenizer.padding_side
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    hidden = datasets.are_progress_bars_disabled()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        tokenizer.padding_side = side
        if not hidden:
            datasets.enable_progress_bars()
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
