"""Rows to token ids, and token ids to padded batches."""

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
        num_prompt: How many of them belong to the prompt.
        truncated: Whether the row was longer than allowed.
    """

    ids: list[int]
    num_prompt: int
    truncated: bool = False


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Encoded:
    """Tokenize a row as training does: prompt and completion together, then the end-of-sequence token.

    Args:
        row: As `read_rows` gives it; prompts and completions that are messages go through the chat template.
        tokenizer: The model's tokenizer.
        max_length: Tokens to keep, from the first; all where not given.

    Returns:
        The tokens.

    Raises:
        DataError: the row has no token, or has messages that the tokenizer has no chat template for.
    """
    if "text" in row:
        ids, num_prompt = _text_ids(row["text"], tokenizer), 0
        ids = [*ids, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else ids
    elif isinstance(row["prompt"], str):
        num_prompt = len(_text_ids(row["prompt"], tokenizer))
        ids = _text_ids(row["prompt"] + row["completion"], tokenizer)
        ids = [*ids, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else ids
    else:
        if tokenizer.chat_template is None:
            raise DataError(
                "the rows are messages, but the model's tokenizer has no chat template.\n"
                "  fix:  give prompt and completion as text"
            )
        num_prompt = len(_chat_ids(row["prompt"], tokenizer, generate=True))
        ids = _chat_ids(row["prompt"] + row["completion"], tokenizer, generate=False)
    if not ids:
        raise DataError("a row has no token.\n  fix:  leave out empty rows")
    kept = ids[:max_length]
    return Encoded(kept, min(num_prompt, len(kept)), truncated=len(kept) < len(ids))


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize what comes before the completion.

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
    """Put token sequences of different length into one batch.

    Args:
        sequences: Token ids.
        pad_id: What fills the rest.
        left: Whether the filling stands before the tokens.

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
    """Batch rows of like length together, with labels on their completions alone.

    Args:
        encoded: The rows.
        pad_id: What fills the rest.
        batch_size: Rows a batch.

    Yields:
        ``input_ids``, ``attention_mask`` and ``labels`` (-100 where nothing is to be predicted), shape (N, P).
    """
    by_length = sorted(encoded, key=lambda row: len(row.ids))
    for start in range(0, len(by_length), batch_size):
        part = by_length[start : start + batch_size]
        batch = pad([row.ids for row in part], pad_id)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, encoded_row in enumerate(part):
            labels[row, : encoded_row.num_prompt] = -100
        yield batch | {"labels": labels}


def _text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize text."""
    return list(tokenizer(text)["input_ids"])


def _chat_ids(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, generate: bool) -> list[int]:
    """Tokenize messages with the model's chat template."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=generate, tokenize=True, return_dict=True)
    return list(ids["input_ids"])
