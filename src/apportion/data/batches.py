"""Tokenize rows and build padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from apportion.data.sources import Row
from apportion.errors import DataError

# Shapes: N rows, P positions of the longest row.


@dataclass(frozen=True)
class Encoded:
    """One row as tokens.

    Args:
        ids: Prompt and completion, with the end-of-sequence token last.
        num_prompt: Number of prompt tokens.
        truncated: Whether the row was truncated.
    """

    ids: list[int]
    num_prompt: int
    truncated: bool = False

    @property
    def num_labels(self) -> int:
        """Number of predicted tokens: those of the completion, except one at the very first position."""
        return max(len(self.ids) - max(self.num_prompt, 1), 0)


@dataclass(frozen=True)
class TrainableRows:
    """Rows that can be trained on, and the numbers of truncated and skipped rows.

    Args:
        rows: Rows with at least one completion token within the limit, in order.
        truncated: Number of these rows that are truncated.
        left_out: Number of rows that are skipped.
    """

    rows: list[Row]
    truncated: int
    left_out: int

    def left_out_message(self, max_length: int) -> str:
        """Describe how many rows have no completion token within `max_length` tokens."""
        total = len(self.rows) + self.left_out
        return f"{self.left_out} of {total} rows have no completion token within {max_length} tokens"


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Encoded:
    """Tokenize a row as for training: prompt and completion together, then the end-of-sequence token.

    The completion starts at the first token that differs from the prompt's own tokens, since a token may span both.

    Args:
        row: As `read_rows` returns it. The chat template is applied to messages.
        tokenizer: The model's tokenizer.
        max_length: Number of tokens to keep, from the first; by default all.

    Returns:
        The tokens.

    Raises:
        DataError: the row has no token, or it has messages and the tokenizer has no chat template.
    """
    if "text" in row:
        ids, num_prompt = _text_ids(row["text"], tokenizer), 0
        ids = [*ids, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else ids
    elif isinstance(row["prompt"], str):
        ids = _text_ids(row["prompt"] + row["completion"], tokenizer)
        num_prompt = _num_common(_text_ids(row["prompt"], tokenizer), ids)
        ids = [*ids, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else ids
    else:
        if tokenizer.chat_template is None:
            raise DataError(
                "the rows are messages, but the model's tokenizer has no chat template.",
                fix="give prompt and completion as text",
            )
        ids = _chat_ids(row["prompt"] + row["completion"], tokenizer, generate=False)
        num_prompt = _num_common(_chat_ids(row["prompt"], tokenizer, generate=True), ids)
    if not ids:
        raise DataError("a row has no token.", fix="remove empty rows")
    kept_ids = ids[:max_length]
    return Encoded(kept_ids, min(num_prompt, len(kept_ids)), truncated=len(kept_ids) < len(ids))


def trainable_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TrainableRows:
    """Skip rows without a completion token within `max_length`: they have no loss.

    Args:
        rows: As `read_rows` returns them.
        tokenizer: The model's tokenizer.
        max_length: Maximum number of tokens per row.

    Returns:
        The other rows, and how many are truncated or skipped.

    Raises:
        DataError: no row has a completion token within `max_length`, a row has no token at all, or a row has messages
            and the tokenizer has no chat template.
    """
    kept_rows: list[Row] = []
    truncated = longest = 0
    for row in rows:
        whole = encode(row, tokenizer)
        cut = Encoded(whole.ids[:max_length], whole.num_prompt, truncated=len(whole.ids) > max_length)
        longest = max(longest, whole.num_prompt)
        if cut.num_labels:
            kept_rows.append(row)
            truncated += cut.truncated
    if not kept_rows:
        limit = f"{max_length} token" if max_length == 1 else f"{max_length} tokens"
        raise DataError(
            f"no row has a completion token within {limit}.",
            found=f"the longest prompt has {longest} tokens",
            fix="raise --max-length",
        )
    return TrainableRows(kept_rows, truncated, len(rows) - len(kept_rows))


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a row's prompt.

    Args:
        row: A row with a prompt.
        tokenizer: The model's tokenizer.

    Returns:
        The token ids.
    """
    if isinstance(row["prompt"], str):
        return _text_ids(row["prompt"], tokenizer)
    return _chat_ids(row["prompt"], tokenizer, generate=True)


def pad(sequences: Sequence[list[int]], pad_id: int, *, left: bool = False) -> dict[str, Tensor]:
    """Pad token sequences to one length.

    Args:
        sequences: Token ids.
        pad_id: Id of the padding token.
        left: Whether to pad on the left.

    Returns:
        ``input_ids`` and ``attention_mask``, int64, shape (N, P).
    """
    longest = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        place = slice(longest - len(ids), longest) if left else slice(len(ids))
        input_ids[row, place] = torch.tensor(ids, dtype=torch.int64)
        attention_mask[row, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def batches(encoded: Sequence[Encoded], pad_id: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batch rows of similar length, with labels only on their completions.

    Args:
        encoded: The rows.
        pad_id: Id of the padding token.
        batch_size: Rows per batch.

    Yields:
        ``input_ids``, ``attention_mask`` and ``labels`` (-100 for ignored positions), shape (N, P).
    """
    by_length = sorted(encoded, key=lambda row: len(row.ids))
    for start in range(0, len(by_length), batch_size):
        part = by_length[start : start + batch_size]
        batch = pad([row.ids for row in part], pad_id)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, encoded_row in enumerate(part):
            labels[row, : encoded_row.num_prompt] = -100
        yield batch | {"labels": labels}


def _num_common(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    return next(
        (n for n, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other), min(len(ids), len(others))
    )


def _text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize text."""
    return list(tokenizer(text)["input_ids"])


def _chat_ids(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, generate: bool) -> list[int]:
    """Tokenize messages with the model's chat template."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=generate, tokenize=True, return_dict=True)
    return list(ids["input_ids"])
