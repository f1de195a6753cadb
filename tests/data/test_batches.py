"""Tokens and batches are those that training sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apportion.data.batches import TrainableRows, batches, encode, pad, trainable_rows
from apportion.errors import DataError

ROW = {"prompt": "Calculate 5 - 3.\nAnswer:", "completion": " 2", "answer": "2"}


def test_labels_are_on_the_completion_alone(embedded_model: tuple[Any, Any]) -> None:
    tokenizer = embedded_model[1]
    long = {"prompt": "Calculate 5 - 3 - 100 + 7.\nAnswer:", "completion": " 2", "answer": "2"}
    (batch,) = batches([encode(long, tokenizer), encode(ROW, tokenizer)], tokenizer.pad_token_id, 2)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert tokenizer.decode(ids[labels != -100]) == f" 2{tokenizer.eos_token}"
    assert batch["attention_mask"].sum(1).tolist() == sorted(batch["attention_mask"].sum(1).tolist())


def test_long_rows_are_cut_and_counted(embedded_model: tuple[Any, Any]) -> None:
    encoded = encode(ROW, embedded_model[1], max_length=4)
    assert len(encoded.ids) == 4
    assert encoded.truncated
    assert encoded.num_prompt == 4


def test_padding_stands_where_it_is_told() -> None:
    left = pad([[1, 2, 3], [4]], 9, left=True)
    right = pad([[1, 2, 3], [4]], 9)
    assert left["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert right["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert torch.equal(left["attention_mask"], right["attention_mask"].flip(1).sort(1).values)


def test_messages_need_a_template(embedded_model: tuple[Any, Any]) -> None:
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match="no chat template"):
        encode(row, embedded_model[1])


def test_digits_are_single_tokens(embedded_model: tuple[Any, Any]) -> None:
    tokenizer = embedded_model[1]
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234")["input_ids"]) == ["1", "2", "3", "4"]
    text = "Größe: 12 € at 5:30\n\ttab"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_completion_starts_where_its_tokens_part_from_the_prompts(embedded_model: tuple[Any, Any]) -> None:
    tokenizer = embedded_model[1]
    encoded = encode({"prompt": "2 Calcul", "completion": "ate 5"}, tokenizer)
    (batch,) = batches([encoded], tokenizer.pad_token_id, 1)
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == f"alculate 5{tokenizer.eos_token}"


def test_rows_whose_completion_is_cut_off_are_left_out_and_counted_apart(embedded_model: tuple[Any, Any]) -> None:
    tokenizer = embedded_model[1]
    prompt = len(tokenizer(ROW["prompt"])["input_ids"])
    long = {"prompt": ROW["prompt"] * 3, "completion": " 2"}
    text = {"text": "Calculate 5 - 3. " * 9}
    rows = [ROW, long, text, ROW]
    assert trainable_rows(rows, tokenizer, 1000) == TrainableRows(rows, truncated=0, left_out=0)
    assert trainable_rows(rows, tokenizer, prompt + 1) == TrainableRows([ROW, text, ROW], truncated=3, left_out=1)
    assert trainable_rows(rows, tokenizer, prompt) == TrainableRows([text], truncated=1, left_out=3)


def test_rows_without_any_completion_token_are_refused_with_the_longest_prompt(
    embedded_model: tuple[Any, Any],
) -> None:
    tokenizer = embedded_model[1]
    long = {"prompt": ROW["prompt"] * 3, "completion": " 2"}
    longest = len(tokenizer(long["prompt"])["input_ids"])
    with pytest.raises(DataError, match=rf"within 4 tokens.*\n.*longest prompt has {longest} tokens.*\n.*--max-length"):
        trainable_rows([ROW, long], tokenizer, 4)
    with pytest.raises(DataError, match="within 1 token"):  # nothing is predicted at the first position
        trainable_rows([{"text": "Calculate"}], tokenizer, 1)
