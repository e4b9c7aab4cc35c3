"""Tokens of many texts in batches of similar length, each padded to its own longest text only."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence


TokenRow = Mapping[
    str, Sequence[int]
]  # a text's "input_ids", "attention_mask", "token_type_ids" or some of them, not padded


def length_sorted_batches(
    rows: Sequence[TokenRow],
    token_budget: int | None = None,
    max_texts: int | None = None,
    boundary: int | None = None,
) -> Iterator[list[int]]:
    """Numbers of rows, the longest first, cut into batches of at most `max_texts` texts and `token_budget` padded tokens (texts times the longest of
    them; a single text may have more). Texts of more tokens than `boundary` and others share no batch.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)
    while order:
        size = len(order) if max_texts is None else max_texts
        if token_budget is not None:
            size = min(size, max(token_budget // len(rows[order[0]]["input_ids"]), 1))
        if boundary is not None and len(rows[order[0]]["input_ids"]) > boundary:
            size = min(size, sum(len(rows[i]["input_ids"]) > boundary for i in order[:size]))
        batch, order = order[:size], order[size:]
        yield batch


def pad_rows(rows: Sequence[TokenRow], pad_token_id: int, padding_side: str) -> dict[str, torch.Tensor]:
    """Rows with the same keys as one tensor a key, `(len(rows), longest)` int64, padded on the "left" or the "right"."""
    padding = {"input_ids": pad_token_id, "attention_mask": 0, "token_type_ids": 0}
    return {
        name: pad_sequence(
            [torch.tensor(row[name]) for row in rows],
            batch_first=True,
            padding_value=padding[name],
            padding_side=padding_side,
        )
        for name in rows[0]
    }
