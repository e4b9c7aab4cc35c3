"""Pairs, batches, micro-batches and keys of stage 0."""

from collections import Counter

import pytest
import torch
from torch.utils.data import IterableDataset

from tests.modeling_proclip import tiny
from trainers.caption_contrastive.batches import (
    CaptionPairCollator,
    CaptionPairs,
    OneSourceBatches,
    TextTokenizer,
    micro_batches,
    pair_keys,
)


ROWS = [{"text": [f"a{i}", f"b{i}", f"c{i}"], "id": i} for i in range(10)]
PLAIN = [{"text": [f"query {i}", f"document {i}"], "instruction": "find it:"} for i in range(7)]


def text_tokenizer(**kwargs):
    return TextTokenizer(tiny.tokenizer(), tiny.LLAMA3, **{"max_length": 64, **kwargs})


def test_two_different_captions_are_drawn_by_seed_epoch_and_row():
    pairs, again = CaptionPairs(ROWS, seed=1), CaptionPairs(ROWS, seed=1)
    for index in range(10):
        pair = pairs[index]
        assert pair == again[index]
        assert pair["query"] != pair["document"] and {pair["query"], pair["document"]} <= set(ROWS[index]["text"])
    drawn = Counter()
    for epoch in range(200):
        pairs.set_epoch(epoch)
        drawn[pairs[3]["query"], pairs[3]["document"]] += 1
    assert len(drawn) == 6 and min(drawn.values()) > 15  # all ordered pairs, 33 times each on average
    assert [pairs[i] for i in range(10)] != [CaptionPairs(ROWS, seed=2)[i] for i in range(10)]


def test_plain_pairs_keep_their_order_and_their_instruction():
    pairs = CaptionPairs(ROWS, 0, PLAIN)
    assert len(pairs) == 17
    assert pairs[12] == {
        "query": "query 2",
        "document": "document 2",
        "negatives": [],
        "id": "document 2\nquery 2",
        "instruction": "find it:",
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ["alone"]}, "row 0 has 1 caption in"),
        ({"text": "alone"}, "row 0 has 1 caption in"),
        ({"text": []}, "row 0 has 0 captions"),
        ({"text": ["a", " "]}, "row 0 has ' ' as number 1"),
        ({"text": ["a", "b"], "negative": [""]}, "row 0 has '' as number 0 in \"negative\""),
        ({"caption": ["a", "b"]}, 'row 0 has no column "text"'),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        CaptionPairs([row], 0)[0]


def test_streams_and_plain_rows_of_three_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(ROWS)

    with pytest.raises(ValueError, match="train_dataset is a stream"):
        CaptionPairs(Stream(), 0)
    with pytest.raises(ValueError, match="plain-text row 0 has 3 texts"):
        CaptionPairs(ROWS, 0, [{"text": ["a", "b", "c"]}])[10]


def test_every_text_is_listed():
    rows = [{"text": ["a", "b"], "negative": "n"}]
    texts = list(CaptionPairs(rows, 0, PLAIN[:1]).texts())
    assert texts == [("a", None), ("b", None), ("n", None), ("query 0", "find it:"), ("document 0", None)]


def test_batches_are_of_one_source_and_no_row_comes_twice():
    pairs = CaptionPairs(ROWS, 0, PLAIN)
    order = OneSourceBatches(pairs, 3)
    numbers = list(order)
    assert len(numbers) == len(order) == 9 + 6 and len(set(numbers)) == 15
    batches = [numbers[i : i + 3] for i in range(0, 15, 3)]
    assert all(len({number >= 10 for number in batch}) == 1 for batch in batches)
    assert sum(batch[0] >= 10 for batch in batches) == 2
    assert numbers == list(order)
    pairs.set_epoch(1)
    assert numbers != list(order)


@pytest.mark.parametrize(("share", "plain_batches"), [(0.0, 0), (0.25, 1), (0.5, 3), (0.75, 9)])
def test_share_of_plain_text(share, plain_batches):
    order = OneSourceBatches(CaptionPairs(ROWS, 0, PLAIN), 3, share)
    numbers = list(order)
    assert len(numbers) == len(order) == 3 * (3 + plain_batches)
    counts = Counter(number for number in numbers if number >= 10)
    # Rows are read again only when all were read.
    assert plain_batches == 0 or max(counts.values()) - min(counts[i] for i in range(10, 17)) <= 1


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="train_dataset has 10 rows"):
        OneSourceBatches(CaptionPairs(ROWS, 0), 11)
    with pytest.raises(ValueError, match="plain_text_dataset has 7 rows"):
        OneSourceBatches(CaptionPairs(ROWS, 0, PLAIN), 8)


def test_micro_batches_hold_every_row_once_and_keep_to_their_limits():
    lengths = [3, 9, 1, 4, 4, 12, 2, 7]
    rows = [
        {"input_ids": [10 + i] * n, "attention_mask": [1] * n, "token_type_ids": [0] + [1] * (n - 1)}
        for i, n in enumerate(lengths)
    ]
    for limits in ({}, {"max_texts": 3}, {"token_budget": 12}, {"max_texts": 2, "token_budget": 20}):
        batches, order = micro_batches(rows, 99, **limits)
        seen = []
        for batch in batches:
            count, width = batch["input_ids"].shape
            assert count <= limits.get("max_texts", 8)
            assert count == 1 or count * width <= limits.get("token_budget", 999)
            for ids, mask, types in zip(*batch.values(), strict=True):
                assert (ids[mask == 0] == 99).all() and mask.tolist() == sorted(mask.tolist())  # padded on the left
                assert types.sum() == mask.sum() - 1
                seen.append(ids[mask == 1].tolist())
        assert seen == [rows[i]["input_ids"] for i in order.tolist()]
        assert sorted(order.tolist()) == list(range(8))


def test_tokens_are_those_of_the_processor_and_instructions_are_not_pooled():
    processor = tiny.processor(max_length=64, prompt_template=tiny.LLAMA3)
    plain, instructed = text_tokenizer()([("a red fox", None), ("a red fox", "find it:")])
    expected = processor(text="a red fox")
    assert plain["input_ids"] == expected["input_ids"] and plain["token_type_ids"] == expected["token_type_ids"]
    assert len(instructed["input_ids"]) > len(plain["input_ids"])
    assert sum(instructed["token_type_ids"]) == sum(plain["token_type_ids"])
    # An instruction of the processor stands before every text.
    by_default = text_tokenizer(instruction="find it:")([("a red fox", None)])[0]
    assert by_default == instructed
    cut = text_tokenizer(max_length=len(plain["input_ids"]) - 1)([("a red fox", None)])[0]
    assert len(cut["input_ids"]) == len(plain["input_ids"]) - 1 and cut["input_ids"][-1] == plain["input_ids"][-1]


def test_a_batch_knows_its_texts_in_order():
    rows = [{"text": ["a longer caption", "b"], "negative": ["n", "m"]}, {"text": ["c", "d"], "negative": "o"}]
    pairs = CaptionPairs(rows, 0)
    tokenizer = text_tokenizer()
    batch = CaptionPairCollator(tokenizer, max_texts=2)([pairs[0], pairs[1]])
    texts = [pairs[0]["query"], pairs[1]["query"], pairs[0]["document"], pairs[1]["document"], "n", "m", "o"]
    expected = [row["input_ids"] for row in tokenizer([(text, None) for text in texts])]
    rows = [
        ids[mask == 1].tolist()
        for part in batch["micro_batches"]
        for ids, mask in zip(part["input_ids"], part["attention_mask"], strict=True)
    ]
    assert [rows[i] for i in batch["order"].argsort().tolist()] == expected
    assert [len(batch[name]) for name in ("query_keys", "document_keys", "negative_keys")] == [2, 2, 3]


def fits(first, second) -> torch.Tensor:
    return (first[:, None, :, None] == second[None, :, None, :]).flatten(2).any(2)


def test_keys_by_hand():
    def pair(query, document, identity, negatives=()):
        return {"query": query, "document": document, "id": identity, "negatives": list(negatives)}

    keys = pair_keys(
        [
            pair("cat", "gato", 1, ["dog"]),
            pair("Katze", "cat", 1),  # of one id with the first
            pair("dog", "perro", 2, ["gato"]),  # its text is a hard negative of the first
            pair("a cat", "gato", 3),  # its document is the first one's
        ]
    )
    documents = fits(keys["query_keys"], keys["document_keys"])
    assert documents.tolist() == [
        [True, True, False, True],
        [True, True, False, False],
        [False, False, True, False],
        [True, False, False, True],
    ]
    # "dog" fits the query "dog"; "gato" fits whoever looks for "gato". A negative does not fit by the id of its row.
    assert fits(keys["query_keys"], keys["negative_keys"]).tolist() == [
        [False, True],
        [False, False],
        [True, False],
        [False, True],
    ]
    assert pair_keys([pair("a", "b", 1)])["negative_keys"].shape == (0, 2)
