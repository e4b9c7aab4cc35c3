"""The card of a text store states what the store's files hold."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

from hub_cards import text_store_card
from hub_cards.citations import CITATIONS
from tests.hub_cards.numbers import held_by_file, stated
from tests.modeling_proclip import tiny
from trainers.data import TextEmbeddingStore


TEXTS = [f"text number {number}" for number in range(7)]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TextEmbeddingStore:
    path = tmp_path_factory.mktemp("stores") / "captions"
    model = tiny.model(text_model_name_or_path="/home/me/models/some-llm")
    processor = tiny.processor(prompt_template=tiny.LLAMA3, max_length=40, instruction="Describe:")
    return TextEmbeddingStore.build(TEXTS, model, processor, path, dtype="float16", progress=False)


def test_every_number_of_the_card_is_in_the_store(store):
    card = text_store_card(store)
    sources = held_by_file(store.path / "store.json") | {str(len(TEXTS)), str(store.num_bytes)}
    assert stated(card.text) <= sources | stated(CITATIONS["proclip"]) | {"2510.18795", "256"}  # SHA-256
    assert "| embeddings | 7 of 32 dimensions, float16, " in card.text
    assert store.fingerprint["weights_sha256"] in card.text and "| instruction | `Describe:` |" in card.text
    assert "| model | some-llm |" in card.text and "/home/me" not in str(card)


def test_the_metadata_survives_a_round_trip(store, tmp_path):
    text_store_card(store, license="cc-by-4.0", languages=["en"], texts="owner/captions").save(tmp_path / "README.md")
    card = DatasetCard.load(tmp_path / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.language == ["en"]
    assert card.data.size_categories == "n<1K" and card.data.pretty_name == "captions"
    assert "Where the texts come from: owner/captions." in card.text


def test_what_nobody_said_is_not_invented(store):
    card = text_store_card(store)
    assert card.data.license == "unknown" and "Licence: unknown: ask" in card.text
    assert "Where the texts come from: not stated." in card.text
    with pytest.raises(ValueError, match="license 'free'"):
        text_store_card(store, license="free")


def test_its_snippet_runs(store, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", text_store_card(store).text, flags=re.DOTALL)
    names = {"texts": TEXTS[:2]}
    exec(block.replace("path/of/this/folder", str(store.path)), names)
    assert names["embeds"].shape == (2, 32)
    assert "7 texts" in capsys.readouterr().out


@pytest.mark.parametrize(("count", "size"), [(999, "n<1K"), (1000, "1K<n<10K"), (5_000_000, "1M<n<10M")])
def test_sizes_are_the_hub_s(store, monkeypatch, count, size):
    monkeypatch.setattr(TextEmbeddingStore, "__len__", lambda store: count)
    assert text_store_card(store).data.size_categories == size
    assert json.loads(Path(store.path / "store.json").read_text())["dim"] == 32
