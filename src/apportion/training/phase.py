"""One phase of supervised fine-tuning: TRL's `SFTTrainer`, and what stops, resumes and saves it."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

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
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.training_args import TrainingArguments
from trl import SFTConfig, SFTTrainer

from apportion.data.batches import encode
from apportion.data.sources import Row
from apportion.errors import DataError, TrainingError
from apportion.peft.attach import apply
from apportion.records.files import use_default_mode, write_text
from apportion.records.plan import Plan
from apportion.training.balance import BalanceLoss
from apportion.training.runs import CHECKPOINTS, RUN_FILE, last_checkpoint, open_run
from apportion.training.settings import TrainSettings

RESULT_FILE = "training.json"


@dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Args:
        model: The trained model.
        steps: Optimizer steps done.
        loss: Mean training loss over the run.
        tokens: Tokens trained on, over all steps.
        seconds: Wall time of this sitting's steps.
        tokens_per_s: Tokens of this sitting over its time.
        truncated: Rows cut to `max_length`.
        interrupted: Whether Ctrl-C ended the run early; a checkpoint was written then.
    """

    model: PeftModel
    steps: int
    loss: float
    tokens: int
    seconds: float
    tokens_per_s: float
    truncated: int
    interrupted: bool

    def as_dict(self) -> dict[str, Any]:
        """Give everything but the model, for JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "model"}


def run_phase(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    rows: Sequence[Row],
    folder: Path,
    settings: TrainSettings,
    *,
    identity: dict[str, Any],
    attach: dict[str, Any] | None = None,
    resume: bool = False,
    progress: bool = True,
    facts: dict[str, Any] | None = None,
) -> TrainResult:
    """Attach a plan's adapters, train them once, and save them.

    Args:
        model: The base model; it gets the adapters.
        tokenizer: Its tokenizer.
        plan: The plan.
        rows: Training rows.
        folder: Folder for the adapter, the checkpoints and the run's facts.
        settings: Settings of the run.
        identity: As `run_identity` gives it.
        attach: More arguments for `apply`.
        resume: Go on in a folder that the same run has left; begin if it is empty.
        progress: Show a bar on standard error.
        facts: More facts to keep in the folder.

    Returns:
        The trained model and the run's figures.

    Raises:
        ConfigurationError: `resume` was asked for a run of other settings.
        OutputExistsError: the folder has something in it and `resume` was not asked for.
        PlanMismatchError: the plan is for another model.
        TrainingError: the loss is not a number.
    """
    last = open_run(folder, identity, resume=resume)
    lengths = [encode(row, tokenizer, settings.max_length) for row in rows]
    truncated = sum(row.truncated for row in lengths)
    _check_formats(rows)
    peft_model = apply(model, plan, **{"seed": settings.seed, "dropout": settings.dropout} | (attach or {}))
    balance = BalanceLoss(peft_model) if settings.balance_loss else None
    run = {"identity": identity, "settings": settings.as_dict(), **(facts or {})}
    write_text(folder / RUN_FILE, json.dumps(run, indent=1) + "\n")

    interrupt = _StopOnInterrupt()
    with _config_restored(peft_model), _quiet(tokenizer), _deterministic():
        trainer = _Trainer(
            model=peft_model,
            args=_arguments(folder / CHECKPOINTS, settings, progress=progress),
            train_dataset=Dataset.from_list([_without_answer(row) for row in rows]),
            processing_class=tokenizer,
            callbacks=[interrupt],
        )
        trainer.balance, trainer.balance_weight = balance, settings.balance_loss
        trainer.remove_callback(PrinterCallback)  # these two write the logs to standard output
        trainer.remove_callback(ProgressCallback)
        if progress:
            trainer.add_callback(_Bar())
        start = time.perf_counter()
        try:
            with interrupt.listening():
                trainer.go_on_from(last)
        finally:
            if balance is not None:
                balance.end()
        seconds = time.perf_counter() - start
    tokens = int(trainer.state.num_input_tokens_seen)
    losses = [{"step": e["step"], "loss": float(e["loss"])} for e in trainer.state.log_history if "loss" in e]
    result = TrainResult(
        model=peft_model,
        steps=trainer.state.global_step,
        loss=sum(entry["loss"] for entry in losses) / len(losses),
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=(tokens - trainer.tokens_before) / seconds,
        truncated=truncated,
        interrupted=interrupt.asked,
    )
    if not interrupt.asked:
        save_adapter(peft_model, folder)
        write_text(folder / RESULT_FILE, json.dumps({**result.as_dict(), "loss_curve": losses}, indent=1) + "\n")
    return result


def save_adapter(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Save an adapter so that its folder holds either all of it or no ``adapter_config.json``.

    Args:
        model: A model with adapters.
        folder: Where ``adapter_model.safetensors`` and ``adapter_config.json`` belong.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapter.", dir=target) as temporary:
        model.save_pretrained(temporary)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            use_default_mode(Path(temporary, name))
            shutil.move(Path(temporary, name), target / name)


class _Trainer(SFTTrainer):
    """TRL's trainer, stopped by the first loss that is not a number, before it reaches the weights."""

    tokens_before = 0
    balance: BalanceLoss | None = None
    balance_weight = 0.0

    def go_on_from(self, checkpoint: Path | None) -> None:
        """Train to the end: from the beginning, from a checkpoint, or not at all where that was the last one.

        transformers does one step too many when it resumes a run that had reached its end.
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

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Add the balance loss, where there is one."""
        if self.balance is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self.balance.begin(inputs.get("attention_mask"))
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss, *outputs = result if isinstance(result, tuple) else (result,)
        own = self.balance.loss().to(loss.device) * self.balance_weight
        if (
            self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
        ):  # then nobody divides by the accumulated batches any more
            own = own / self.current_gradient_accumulation_steps
        return (loss + own, *outputs) if outputs else loss + own

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one step and look at its loss."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            last = last_checkpoint(Path(self.args.output_dir))
            kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
            raise TrainingError(
                f"the loss became {float(loss)} at step {self.state.global_step + 1}; training stopped.\n"
                f"  found:  {kept}\n  fix:    lower the learning rate, or look for broken rows near this step"
            )
        return loss


class _Bar(ProgressCallback):
    """One bar on standard error with the newest figures beside it; transformers' own prints them on standard output."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the newest figures."""
        logs = kwargs.get("logs", {})
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=logs["loss"], lr=logs["learning_rate"])


class _StopOnInterrupt(TrainerCallback):
    """Turn Ctrl-C into a checkpoint and an end."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the interrupt signal while training runs; a second one is the usual interrupt."""
        previous = signal.getsignal(signal.SIGINT)

        def note(_number: int, _frame: FrameType | None) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, previous)

        try:
            signal.signal(signal.SIGINT, note)
        except ValueError:  # not in the main thread: signals are somebody else's
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save and stop after the step in which the signal came."""
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
        return control


def _arguments(folder: Path, settings: TrainSettings, *, progress: bool) -> SFTConfig:
    """Translate the settings into TRL's."""
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.steps if settings.steps is not None else -1,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_frac,  # below 1: a share of all steps
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
        disable_tqdm=not progress,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _check_formats(rows: Sequence[Row]) -> None:
    """Refuse rows of several formats in one training set: the trainer reads them all as the first one."""
    formats = {
        "text" if "text" in row else "text prompts" if isinstance(row["prompt"], str) else "messages" for row in rows
    }
    if len(formats) > 1:
        raise DataError(
            f"the rows have several formats: {' and '.join(sorted(formats))}.\n  fix:  bring all tasks into one format"
        )


def _without_answer(row: Row) -> Row:
    """Leave out the column that training does not use."""
    return {name: value for name, value in row.items() if name != "answer"}


@contextmanager
def _config_restored(model: PeftModel) -> Iterator[None]:
    """Give the model's configuration back the settings that a trainer changes for itself."""
    config = model.get_base_model().config.get_text_config()
    names = ("output_router_logits", "router_aux_loss_coef", "use_cache")
    before = {name: getattr(config, name) for name in names if hasattr(config, name)}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Have PyTorch add up in a fixed order where it can, so that equal runs end with equal weights."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags: Any = torch.utils.deterministic
    filled = flags.fill_uninitialized_memory
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    flags.fill_uninitialized_memory = False  # a third of the time, to find bugs we do not have
    try:
        yield
    finally:
        flags.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _quiet(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Give the tokenizer its padding side back, keep its threads out of forks, and hide the data's own bars."""
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
