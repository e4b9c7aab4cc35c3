"""Every layout of pictures with captions gives the same rows; wrong ones are refused by name; broken rows are counted and bounded."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from tests.trainers.tiny_pairs import LAYOUTS, captions, color, picture, picture_bytes, write_layout, write_webdataset
from trainers.data import PairSource, iter_texts, open_pairs


def numbers(rows) -> list[int]:
    """Which pictures the rows show; checks that each has its captions."""
    shown = [row["image"].getpixel((0, 0))[0] for row in rows]
    assert [row["text"] for row in rows] == [captions(number) for number in shown]
    return shown


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows(tmp_path, layout):
    source = write_layout(tmp_path / layout, layout)
    rows = open_pairs(source)
    assert numbers([rows[i] for i in range(len(rows))]) == [0, 1, 2, 3, 4, 5]
    assert rows[2]["image"].mode == "RGB" and rows[2]["image"].getpixel((3, 2)) == color(2)
    stream = open_pairs(replace(source, streaming=True), seed=1)
    assert sorted(numbers(list(stream))) == [0, 1, 2, 3, 4, 5]
    assert list(iter_texts(source)) == [text for number in range(6) for text in captions(number)]
    assert open_pairs(source, images=False)[4] == {"text": captions(4)}
    texts_only = list(open_pairs(replace(source, streaming=True), images=False))
    assert sorted(row["text"] for row in texts_only) == sorted(captions(i) for i in range(6))
    assert all(row.keys() == {"text"} for row in texts_only)


def test_data_workers_read_rows_by_number(tmp_path):
    rows = open_pairs(write_layout(tmp_path, "jsonl"))
    loader = DataLoader(rows, batch_size=2, num_workers=1, collate_fn=list)
    assert [numbers(batch) for batch in loader] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_columns_are_refused_with_those_that_are_there(tmp_path, layout):
    source = write_layout(tmp_path / layout, layout)
    there = {
        "webdataset": "png, json",
        "parquet": "picture, texts",
        "jsonl": "path, text",
        "csv": "path, short, long",
    }.get(layout, "image, text")
    for streaming in (True, False):
        source = replace(source, streaming=streaming)
        with pytest.raises(ValueError, match=rf"no column 'nothing' or 'none' for the images .* columns are {there}"):
            open_pairs(replace(source, image_column=["nothing", "none"]))
        with pytest.raises(ValueError, match=rf"no column 'title' for the captions .* columns are {there}"):
            open_pairs(replace(source, text_columns=["title"]))


def raise_connection_error(*args, **kwargs):
    raise ConnectionError("offline")


def test_places_without_pairs_are_refused(tmp_path, monkeypatch):
    def message(kind, path, **fields):
        with pytest.raises(kind) as error:
            open_pairs(PairSource(source=str(path), **fields))
        return str(error.value)

    assert "there is no file or folder" in message(FileNotFoundError, tmp_path / "nowhere")
    assert "no file fits the pattern" in message(FileNotFoundError, tmp_path / "*.tar")
    with monkeypatch.context() as hub:
        hub.setattr("datasets.load_dataset", raise_connection_error)
        assert "neither a file or folder nor a dataset" in message(FileNotFoundError, "nobody/nothing")
    (tmp_path / "empty").mkdir()
    assert "is empty" in message(ValueError, tmp_path / "empty")
    (tmp_path / "pictures").mkdir()
    picture(0).save(tmp_path / "pictures" / "0.png")
    assert "holds images but no captions: put a metadata.jsonl" in message(ValueError, tmp_path / "pictures")
    (tmp_path / "a.docx").write_text("")
    assert "is of an unknown kind: rows are read from .tar, " in message(ValueError, tmp_path / "a.docx")
    source = write_layout(tmp_path / "saved", "saved").source
    assert "has no split 'test'; it has train" in message(ValueError, source, split="test")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_columns": []}, "text_columns must be"),
        ({"image_column": ""}, "image_column must be"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size must be at least 1, got 0"),
        ({"max_broken_fraction": 1.5}, "max_broken_fraction must be between 0 and 1, got 1.5"),
    ],
)
def test_settings_without_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PairSource(source="a", **fields)


BROKEN = {1: b"", 4: picture_bytes(4)[:50], 5: b"no picture"}


def write_broken(folder):
    """12 rows: the pictures of 1, 4 and 5 are broken."""
    write_webdataset(folder, [6, 6], BROKEN)
    return PairSource(source=str(folder), image_column="png", text_columns="json.captions", max_broken_fraction=0.3)


def test_another_row_stands_in_for_a_broken_one(tmp_path, caplog):
    source = write_broken(tmp_path)
    rows = open_pairs(source, seed=3)
    shown = numbers([rows[i] for i in range(12)])
    assert [i for i in range(12) if shown[i] != i] == [1, 4, 5] and not set(shown) & set(BROKEN)
    again = open_pairs(source, seed=3)
    assert numbers([again[i] for i in reversed(range(12))])[::-1] == shown, "whatever was read before"
    other = open_pairs(source, seed=4)
    assert numbers([other[i] for i in (1, 4, 5)]) != [shown[i] for i in (1, 4, 5)]
    skipped = rows.skipped()
    assert (skipped.rows, skipped.broken_images, skipped.without_caption) == (12, 3, 0)
    assert "passed over 000.tar, 00001:" in caplog.text and "it has no bytes" in caplog.text


def test_data_workers_count_together(tmp_path):
    rows = open_pairs(write_broken(tmp_path))
    list(DataLoader(rows, batch_size=3, num_workers=2, collate_fn=list))
    assert (rows.skipped().rows, rows.skipped().broken_images) == (12, 3)


def test_a_stream_passes_over_broken_rows(tmp_path):
    stream = open_pairs(replace(write_broken(tmp_path), streaming=True))
    assert sorted(numbers(list(stream))) == [0, 2, 3, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("streaming", [True, False])
def test_too_many_broken_rows_are_an_error(tmp_path, streaming):
    rows = open_pairs(replace(write_broken(tmp_path), streaming=streaming, max_broken_fraction=0.2))
    with pytest.raises(
        ValueError, match=r"3 broken images and 0 rows without .* 0.2 allows. The first: 00\d.tar, 0000\d: .*Repair"
    ):
        list(rows) if streaming else [rows[i] for i in range(12)]


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_without_a_caption_are_counted(tmp_path, streaming):
    texts = [["a"], [], [" "], None, ["e", None]]
    for i in range(5):
        picture(i).save(tmp_path / f"{i}.png")
    lines = [json.dumps({"image": f"{i}.png", "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = PairSource(source=str(tmp_path / "a.jsonl"), streaming=streaming, max_broken_fraction=0.6)
    rows = open_pairs(source)
    shown = list(rows) if streaming else [rows[i] for i in range(5)]
    assert {text for row in shown for text in row["text"]} == {"a", "e"}
    assert list(iter_texts(source)) == ["a", "e"]
    if not streaming:
        assert (rows.skipped().broken_images, rows.skipped().without_caption) == (0, 3)


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image": "0.png", "text": 7}')
    with pytest.raises(ValueError, match="column 'text' holds the int 7, where a text was expected"):
        list(iter_texts(PairSource(source=str(tmp_path / "a.jsonl"))))


def test_a_shard_that_is_cut_short_is_named(tmp_path):
    shards = write_webdataset(tmp_path, [5, 5])
    shards[1].write_bytes(shards[1].read_bytes()[:2600])
    source = PairSource(source=str(tmp_path), image_column="png", text_columns="json.captions", streaming=True)
    with pytest.raises(ValueError, match=r"001.tar cannot be read to its end: ReadError"):
        list(open_pairs(source))


def test_rows_are_reproducible_by_seed_and_epoch(tmp_path):
    write_webdataset(tmp_path, [7, 9, 8])
    source = PairSource(source=str(tmp_path), image_column="png", text_columns="json.captions", streaming=True)

    def order(seed, epoch, **fields):
        stream = open_pairs(replace(source, **fields), seed)
        stream.set_epoch(epoch)
        return numbers(list(stream))

    first = order(0, 0)
    assert sorted(first) == list(range(24)) and first != list(range(24))
    assert first == order(0, 0)
    torch.manual_seed(5)
    assert first == order(0, 0)
    assert first != order(0, 1) and first != order(1, 0) and sorted(order(0, 1)) == list(range(24))
    one_by_one = order(0, 0, shuffle_buffer_size=1)
    shards = [list(range(7)), list(range(7, 16)), list(range(16, 24))]
    assert any(one_by_one == a + b + c for a in shards for b in shards for c in shards), "shards are shuffled"
