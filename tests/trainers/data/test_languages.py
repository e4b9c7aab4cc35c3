"""Each language gets the same share of an epoch, by seed and epoch alone."""

from collections import Counter

import pytest

from tests.trainers.tiny_training import CAPTIONS, inheritance_trainer
from trainers.data import BalancedLanguages
from trainers.data.captions import DrawnCaptions


ROWS = [
    {"text": captions, "language": "en" if i < 18 else "de" if i < 22 else "fa"} for i, captions in enumerate(CAPTIONS)
]


def shown(rows) -> list[str]:
    return [rows[i]["text"] for i in range(len(rows))]


def test_shares_are_equal_and_all_rows_are_shown():
    rows = BalancedLanguages(ROWS, 0)
    assert Counter(rows[i]["language"] for i in range(len(rows))) == {"de": 8, "en": 8, "fa": 8}
    counts = Counter(texts[0] for texts in shown(rows))
    assert {counts[captions[0]] for captions in CAPTIONS[18:22]} == {2}
    assert {counts[captions[0]] for captions in CAPTIONS[22:]} == {4}
    seen = set()
    for epoch in range(20):
        rows.set_epoch(epoch)
        seen |= {texts[0] for texts in shown(rows)}
    assert seen == {captions[0] for captions in CAPTIONS}


def test_the_order_depends_on_seed_and_epoch_only():
    first, second = BalancedLanguages(ROWS, 0), BalancedLanguages(ROWS, 1)
    assert shown(first) == shown(BalancedLanguages(ROWS, 0)) != shown(second)
    one = shown(first)
    first.set_epoch(1)
    assert shown(first) != one
    first.set_epoch(0)
    assert [first[i]["text"] for i in reversed(range(len(first)))] == one[::-1]


def test_the_trainer_tells_it_the_epoch(tmp_path):
    rows = BalancedLanguages(ROWS, 0)
    drawn = DrawnCaptions(rows, 0)
    drawn.set_epoch(3)
    assert rows.epoch == 3
    inheritance_trainer(tmp_path, rows=rows, num_train_epochs=3).train()
    assert rows.epoch == 2


def test_a_row_without_a_language_is_named():
    with pytest.raises(ValueError, match='row 1 has no "language"'):
        BalancedLanguages([{"text": "a", "language": "en"}, {"text": "b"}], 0)
