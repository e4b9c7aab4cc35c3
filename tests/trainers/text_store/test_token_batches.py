"""Rows of tokens in batches of similar length."""

import torch

from trainers.text_store.token_batches import length_sorted_batches, pad_rows


ROWS = [{"input_ids": [7] * length, "attention_mask": [1] * length} for length in (2, 5, 1, 4, 2)]


def test_the_longest_come_first_and_the_budget_counts_padding():
    assert list(length_sorted_batches(ROWS)) == [[1, 3, 0, 4, 2]]
    assert list(length_sorted_batches(ROWS, token_budget=10)) == [[1, 3], [0, 4, 2]]
    assert list(length_sorted_batches(ROWS, token_budget=3)) == [[1], [3], [0], [4], [2]], "one text may have more"
    assert list(length_sorted_batches(ROWS, token_budget=100, max_texts=2)) == [[1, 3], [0, 4], [2]]
    assert list(length_sorted_batches([], token_budget=3)) == []


def test_rows_are_padded_on_either_side():
    left, right = (pad_rows([ROWS[0], ROWS[2]], 9, side) for side in ("left", "right"))
    assert left["input_ids"].tolist() == [[7, 7], [9, 7]] and left["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert right["input_ids"].tolist() == [[7, 7], [7, 9]] and right["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert left["input_ids"].dtype == torch.int64 and left.keys() == {"input_ids", "attention_mask"}
