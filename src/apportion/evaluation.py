"""Evaluate a model on rows: loss and perplexity, and exact match if rows have an answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from apportion.data.batches import batches, encode, pad, prompt_ids
from apportion.data.sources import Row
from apportion.errors import DataError
from apportion.profiling.routing import evaluation_mode

_SHOW_AFTER_S = 2.0


@dataclass(frozen=True)
class Evaluation:
    """Results on one data set.

    Args:
        samples: Number of rows.
        loss: Mean negative log-likelihood per completion token, in nats.
        tokens: Number of completion tokens.
        truncated: Number of rows that were longer than the limit.
        exact_match: Fraction of rows whose greedy answer is the expected one; None if rows have no answer.
        left_out: Number of rows with no completion token within the limit. They count only for exact match.
    """

    samples: int
    loss: float
    tokens: int
    truncated: int
    exact_match: float | None
    left_out: int = 0

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self) | {"perplexity": self.perplexity}


def evaluate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int = 32,
    max_length: int = 1024,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a model on rows.

    Args:
        model: The model, with or without adapters.
        tokenizer: Its tokenizer.
        rows: As `read_rows` returns them.
        batch_size: Rows per batch.
        max_length: Maximum number of tokens per row for the loss. The results have the numbers of truncated rows and of
            rows without a completion token within it.
        progress: Show a progress bar on standard error if it takes longer than two seconds.

    Returns:
        Loss over all completion tokens, and exact match if every row has an answer.

    Raises:
        DataError: there is no row, or no completion token within `max_length`.
    """
    if not rows:
        raise DataError("there is no row to evaluate.")
    loss, tokens, truncated = completion_loss(model, tokenizer, rows, batch_size, max_length, progress=progress)
    scored = all("answer" in row and "prompt" in row for row in rows)
    matches = exact_matches(model, tokenizer, rows, batch_size, progress=progress) if scored else None
    return Evaluation(
        samples=len(rows),
        loss=loss,
        tokens=tokens,
        truncated=truncated,
        exact_match=sum(matches) / len(matches) if matches is not None else None,
        left_out=sum(not encode(row, tokenizer, max_length).num_labels for row in rows),
    )


@dataclass(frozen=True)
class MultiTaskEvaluation:
    """Results on several tasks, and their mean with equal weights.

    Args:
        tasks: Results by task.
    """

    tasks: dict[str, Evaluation]

    @property
    def loss(self) -> float:
        """The mean of the tasks' losses."""
        return sum(result.loss for result in self.tasks.values()) / len(self.tasks)

    @property
    def exact_match(self) -> float | None:
        """The mean of the tasks' exact match; None if a task has no answers."""
        shares = [result.exact_match for result in self.tasks.values() if result.exact_match is not None]
        return sum(shares) / len(shares) if len(shares) == len(self.tasks) else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        tasks = {name: result.as_dict() for name, result in self.tasks.items()}
        return {"tasks": tasks, "mean": {"loss": self.loss, "exact_match": self.exact_match}}


def evaluate_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Sequence[Row]],
    **settings: Any,
) -> MultiTaskEvaluation:
    """Evaluate a model on several tasks.

    Args:
        model: The model, with or without adapters.
        tokenizer: Its tokenizer.
        rows: Rows by task.
        **settings: Keyword arguments of `evaluate`.

    Returns:
        Results by task.

    Raises:
        DataError: a task has no row, or no completion token within `max_length`.
    """
    return MultiTaskEvaluation({name: evaluate(model, tokenizer, part, **settings) for name, part in rows.items()})


def completion_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int,
    max_length: int,
    *,
    progress: bool = False,
) -> tuple[float, int, int]:
    """Compute the mean loss over all completion tokens of the rows.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: The rows.
        batch_size: Rows per batch.
        max_length: Maximum number of tokens per row.
        progress: Show a progress bar.

    Returns:
        Mean loss in nats, number of completion tokens, number of truncated rows.

    Raises:
        DataError: there is no completion token within `max_length`.
    """
    encoded = [encode(row, tokenizer, max_length) for row in rows]
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with (
        evaluation_mode(model),
        torch.no_grad(),
        tqdm(total=len(rows), desc="loss", disable=not progress, delay=_SHOW_AFTER_S) as bar,
    ):
        for batch in batches(encoded, _pad_id(tokenizer), batch_size):
            labels = batch.pop("labels")[:, 1:].to(device)
            logits = model(**{name: value.to(device) for name, value in batch.items()}).logits[:, :-1]
            losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
            total += float(losses)
            count += int((labels != -100).sum())
            bar.update(len(labels))
    if count == 0:
        raise DataError(f"there is no completion token within {max_length} tokens.", fix="raise --max-length")
    return total / count, count, sum(row.truncated for row in encoded)


def exact_matches(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int,
    *,
    progress: bool = False,
) -> list[bool]:
    """Generate greedily and compare with the answers, ignoring differences in white space.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: Rows with a prompt and an answer.
        batch_size: Rows per batch.
        progress: Show a progress bar.

    Returns:
        For each row, whether the answer matches exactly.
    """
    prompts = [prompt_ids(row, tokenizer) for row in rows]
    longest = max(len(tokenizer(f" {row['answer']}")["input_ids"]) for row in rows)
    device = next(model.parameters()).device
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=longest + 2,
        pad_token_id=_pad_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    order = sorted(range(len(rows)), key=lambda number: len(prompts[number]))
    matches = [False] * len(rows)
    with (
        evaluation_mode(model),
        torch.no_grad(),
        tqdm(total=len(rows), desc="answers", disable=not progress, delay=_SHOW_AFTER_S) as bar,
    ):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = pad([prompts[number] for number in part], _pad_id(tokenizer), left=True)
            batch = {name: value.to(device) for name, value in batch.items()}
            output = model.generate(**batch, generation_config=settings)
            texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for number, text in zip(part, texts, strict=True):
                matches[number] = text.split() == str(rows[number]["answer"]).split()
            bar.update(len(part))
    return matches


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding id."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
