"""What is counted in a batch, and where its rows are in the data set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from conftest import batch_of
from lopt.data.batches import count_tokens, describe_rows, padded_tokens, row_numbers, width
from small_model import byte_tokenizer


def count(batch: Any) -> int | None:
    """The real tokens of a batch."""
    counts = count_tokens([batch, batch], torch.device("cpu"))
    assert counts is None or counts[0] == counts[1]
    return None if counts is None else int(counts[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_rows_without_a_label_do_not_count_as_real(side: str) -> None:
    batch = batch_of([9, 5, 2], side)
    assert (count(batch), padded_tokens(batch), width(batch)) == (16, 27, 9)
    batch["labels"][1] = -100
    assert count(batch) == 11
    del batch["labels"]
    assert count(batch) == 16
    del batch["attention_mask"]
    assert count(batch) == 27


def test_batches_without_token_rows() -> None:
    rollouts = {"prompt_ids": torch.zeros(2, 3), "completion_ids": torch.zeros(2, 4)}
    assert (count(rollouts), padded_tokens(rollouts), width(rollouts)) == (None, 0, 7)
    for other in ([{"prompt": "text"}], {}):
        assert (count(other), padded_tokens(other), width(other)) == (None, 0, None)
        assert describe_rows(None, None, [other]) == ""


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_found_whatever_their_padding(side: str) -> None:
    tokenizer = byte_tokenizer()
    texts = ["one", "two and more", "three", "two and more"]
    dataset = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])
    tokenizer.padding_side = side
    batch = tokenizer(["three", "two and more"], padding=True, return_tensors="pt")
    message = "rows 1, 2, 3 of the 4 that were prepared, from 0; the first starts with 'three'"
    assert describe_rows(dataset, tokenizer, [batch]) == message
    assert row_numbers(dataset, [[1, 2, 3]]) == [] == row_numbers(dataset.to_iterable_dataset(), [[1]])
    stream = describe_rows(dataset.to_iterable_dataset(), tokenizer, [batch])
    assert stream == "the first row starts with 'three'"
