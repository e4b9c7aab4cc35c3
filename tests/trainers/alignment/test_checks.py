"""All captions are looked for before a training begins, without decoding a picture."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainers.tiny_encoders import tiny_proclip
from tests.trainers.tiny_pairs import captions, color, write_layout
from tests.trainers.tiny_training import picture_rows, tuning_trainer
from trainers.alignment.checks import check_texts
from trainers.data import BalancedLanguages, TextEmbeddingStore, open_pairs


@pytest.fixture(scope="module")
def model_and_store(tmp_path_factory):
    """Of the captions of four pictures."""
    model, processor = tiny_proclip()
    texts = [caption for i in range(4) for caption in captions(i)]
    return model, TextEmbeddingStore.build(texts, model, processor, tmp_path_factory.mktemp("store") / "llm")


def undecodable(count: int) -> datasets.Dataset:
    rows = [{"image": {"bytes": b"no picture", "path": None}, "text": captions(i)} for i in range(count)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    return datasets.Dataset.from_list(rows, features=features)


def pairs(tmp_path, count: int):
    return open_pairs(write_layout(tmp_path / str(count), "webdataset", count))


MAKERS = {
    "list": lambda tmp_path, count: [{"text": captions(i)} for i in range(count)],
    "languages": lambda tmp_path, count: BalancedLanguages(
        [{"text": captions(i), "language": "en"} for i in range(count)], 0
    ),
    "datasets": lambda tmp_path, count: undecodable(count),
    "pairs": pairs,
}


@pytest.mark.parametrize("kind", list(MAKERS))
def test_all_captions_are_looked_for(tmp_path, model_and_store, kind, monkeypatch):
    monkeypatch.setattr("trainers.data.pair_rows.decode_stored_image", lambda *args: 1 / 0)
    store = model_and_store[1]
    check_texts("text_store", store, MAKERS[kind](tmp_path, 4))
    with pytest.raises(KeyError, match="text_store: 4 of the texts are not in the text store .*caption 4.*caption 5"):
        check_texts("text_store", store, MAKERS[kind](tmp_path, 6))


@pytest.mark.parametrize("where", ["train", "eval"])
def test_a_training_is_refused_before_it_begins(tmp_path, model_and_store, where):
    model, store = model_and_store
    rows = [{**row, "text": captions(i % 4)} for i, row in enumerate(picture_rows(6))]
    last_is_missing = [*rows[:-1], {**rows[-1], "text": [captions(0)[0], "nobody knows this"]}]
    train, evaluated = (last_is_missing, rows) if where == "train" else (rows, {"held out": last_is_missing})
    tuning_trainer(tmp_path, model, rows=rows, text_store=store, eval_dataset=rows)
    with pytest.raises(KeyError, match="1 of the texts are not in the text store.*nobody knows this"):
        tuning_trainer(tmp_path, model, rows=train, text_store=store, eval_dataset=evaluated)


def test_a_dataset_with_a_transform_is_trained_on(tmp_path, model_and_store):
    """As Transformers' image examples prepare theirs: the transform needs the image, so captions cannot be read without it."""
    model, store = model_and_store
    images = [Image.new("RGB", (8, 8), color(i)) for i in range(6)]
    rows = datasets.Dataset.from_dict({"image": images, "caption": [captions(i % 4) for i in range(6)]})
    shown = []

    def transform(batch):
        shown.extend(batch["caption"])
        pixels = [torch.as_tensor(np.array(image)).permute(2, 0, 1) / 255 for image in batch["image"]]
        return {"pixel_values": pixels, "text": batch["caption"]}

    tuning_trainer(tmp_path, model, rows=rows.with_transform(transform), text_store=store, max_steps=1).train()
    assert len(shown) >= 6


@pytest.mark.parametrize("format", ["arrow", "pandas"])
def test_a_dataset_whose_rows_are_no_columns_is_refused_in_words(tmp_path, model_and_store, format):
    model, store = model_and_store
    rows = datasets.Dataset.from_dict({"pixel_values": [[0.0]] * 6, "text": ["a"] * 6}).with_format(format)
    with pytest.raises(
        ValueError, match=r"row 0 is a .*, not columns with their values: .* dataset.with_format\(None\)"
    ):
        tuning_trainer(tmp_path, model, rows=rows, text_store=store)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "row 2 has no caption"),
        ([], "row 2 has no caption"),
        ("", "row 2 has no caption"),
        (7, 'row 2 has the int 7 in "text"'),
        (["a fox", None], 'row 2 has the NoneType None in "text"'),
    ],
)
def test_a_row_without_a_caption_is_named(tmp_path, model_and_store, text, message):
    model, store = model_and_store
    rows = [{**row, "text": captions(i % 4)} for i, row in enumerate(picture_rows(6))]
    rows[2]["text"] = text
    with pytest.raises(ValueError, match=message):
        tuning_trainer(tmp_path, model, rows=rows, text_store=store)
