"""What holds around a run of the trainer: TRL's arguments, deterministic algorithms, silence, settings put back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from apportion.compat.transformers import activation_checkpointing
from apportion.cpu_caches import CPU_CACHES
from apportion.errors import ApportionWarning
from apportion.training.settings import TrainSettings


def arguments(folder: Path, settings: TrainSettings, *, progress: bool) -> SFTConfig:
    """Convert the settings to TRL's.

    Args:
        folder: Folder for checkpoints.
        settings: The settings.
        progress: Show a progress bar.

    Returns:
        TRL's settings.
    """
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
        **activation_checkpointing(is_on=settings.gradient_checkpointing),
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


def warn_of_small_caches(model: PreTrainedModel | PeftModel, settings: TrainSettings) -> None:
    """Warn if oneDNN's primitive caches are too small for batches of many lengths.

    Args:
        model: The model.
        settings: The settings.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    missing = [f"{name}={value}" for name, value in CPU_CACHES.items() if name not in os.environ]
    if missing and not torch.cuda.is_available() and (settings.bf16 or base.dtype == torch.bfloat16):
        warnings.warn(
            "bfloat16 on a CPU is slow with batches of many lengths, because PyTorch's caches of prepared matrix "
            f"products are too small. For speed, set {' and '.join(missing)} before Python starts.",
            ApportionWarning,
            stacklevel=3,
        )


@contextmanager
def config_restored(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Restore the settings of the model's configuration that the trainer changes.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    config = (model.get_base_model() if isinstance(model, PeftModel) else model).config.get_text_config()
    names = ("output_router_logits", "router_aux_loss_coef", "use_cache")
    before = {name: getattr(config, name) for name in names if hasattr(config, name)}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextmanager
def deterministic() -> Iterator[None]:
    """Use PyTorch's deterministic algorithms where they exist, so that equal runs give equal weights.

    Yields:
        Nothing.
    """
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
def quiet(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Hide datasets' progress bars, disable tokenizer threads, and restore the tokenizer's padding side.

    Args:
        tokenizer: The tokenizer.

    Yields:
        Nothing.
    """
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
