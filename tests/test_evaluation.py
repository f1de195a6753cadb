"""Scores against scores computed one row at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from apportion.data.sources import read_rows
from apportion.data.tasks import task_rows
from apportion.errors import DataError
from apportion.evaluation import evaluate


def test_scores_equal_those_of_single_rows(embedded_model: tuple[Any, Any]) -> None:
    model, tokenizer = embedded_model
    rows = task_rows("syllogism", "test", num_rows=12) + task_rows("gcd", "test", num_rows=12)
    found = evaluate(model, tokenizer, rows, batch_size=5)
    total, count, matches = 0.0, 0, 0
    for row in rows:
        prompt = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        whole = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            scores = model(input_ids=whole).logits[0, :-1].log_softmax(-1)
            output = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
        targets = whole[0, 1:]
        start = prompt.shape[1] - 1
        total -= float(scores[range(start, len(targets)), targets[start:]].sum())
        count += len(targets) - start
        text = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        matches += text.strip() == row["answer"]
    assert found.tokens == count
    assert found.loss == pytest.approx(total / count, rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-3)
    assert found.exact_match == matches / len(rows)
    assert 0 < matches < len(rows)


def test_batches_do_not_change_scores(embedded_model: tuple[Any, Any]) -> None:
    model, tokenizer = embedded_model
    rows = read_rows("task:aiw:test", num_rows=16)
    one, many = (evaluate(model, tokenizer, rows, batch_size=size) for size in (1, 16))
    assert one.loss == pytest.approx(many.loss, rel=1e-4)
    assert one.exact_match == many.exact_match


def test_rows_without_answers_have_no_exact_match(embedded_model: tuple[Any, Any]) -> None:
    result = evaluate(*embedded_model, [{"text": "Calculate 5 - 3."}])
    assert result.exact_match is None
    assert result.loss > 0


def test_nothing_to_score_is_an_error(embedded_model: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match="no row"):
        evaluate(*embedded_model, [])
    with pytest.raises(DataError, match="there is no completion token within 3 tokens"):
        evaluate(*embedded_model, read_rows("task:aiw", num_rows=2), max_length=3)


def test_rows_that_the_loss_leaves_out_are_counted(embedded_model: tuple[Any, Any]) -> None:
    row = read_rows("task:aiw", num_rows=1)[0]
    long = {**row, "prompt": row["prompt"] * 40}
    found = evaluate(*embedded_model, [row, long, long], max_length=256)
    assert found.left_out == 2
    assert found.samples == 3
    assert found.loss == pytest.approx(evaluate(*embedded_model, [row]).loss, rel=1e-4)
    assert found.as_dict()["left_out"] == 2
