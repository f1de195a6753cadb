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

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted: those of the completion, but for one at the very first position."""
        return max(len(self.ids) - max(self.num_prompt, 1), 0)


@dataclass(frozen=True)
class TrainableRows:
    """The rows that have something to learn, and what cutting did to the others.

    Args:
        rows: Rows with at least one completion token within the limit, in their order.
        truncated: How many of these are cut.
        left_out: How many rows are not among them.
    """

    rows: list[Row]
    truncated: int
    left_out: int

    def left_out_message(self, max_length: int) -> str:
        """Say how many rows have no completion token within a number of tokens."""
        total = len(self.rows) + self.left_out
        return f"{self.left_out} of {total} rows have no completion token within {max_length} tokens"


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Encoded:
    """Tokenize a row as training does: prompt and completion together, then the end-of-sequence token.

    The completion starts where its tokens part from those of the prompt alone: a token may span both.

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
        raise DataError("a row has no token.", fix="leave out empty rows")
    kept = ids[:max_length]
    return Encoded(kept, min(num_prompt, len(kept)), truncated=len(kept) < len(ids))


def trainable_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TrainableRows:
    """Leave out the rows whose completion is cut off whole: no loss can be computed on them.

    Args:
        rows: As `read_rows` gives them.
        tokenizer: The model's tokenizer.
        max_length: Tokens of a row that are kept, from the first.

    Returns:
        The other rows, and how many are cut or left out.

    Raises:
        DataError: no row has a completion token within `max_length`, a row has no token at all, or has messages that
            the tokenizer has no chat template for.
    """
    kept: list[Row] = []
    truncated = longest = 0
    for row in rows:
        whole = encode(row, tokenizer)
        cut = Encoded(whole.ids[:max_length], whole.num_prompt, truncated=len(whole.ids) > max_length)
        longest = max(longest, whole.num_prompt)
        if cut.num_labels:
            kept.append(row)
            truncated += cut.truncated
    if not kept:
        limit = f"{max_length} token" if max_length == 1 else f"{max_length} tokens"
        raise DataError(
            f"no row has a completion token within {limit}.",
            found=f"the longest prompt has {longest} tokens",
            fix="raise --max-length",
        )
    return TrainableRows(kept, truncated, len(rows) - len(kept))


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


def _num_common(ids: Sequence[int], others: Sequence[int]) -> int:
    """Count the tokens that two sequences start with together."""
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
