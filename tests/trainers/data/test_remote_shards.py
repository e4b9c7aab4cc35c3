"""Tables and shards in an object store give the rows of the same files here, and take no more room than they may."""

import pytest
from torch.utils.data import DataLoader

from tests.trainers.tiny_pairs import captions, write_layout, write_webdataset
from trainers.data import PairSource, iter_texts, open_pairs
from trainers.data.stream_loader import StreamLoader
from trainers.data.text_files import read_texts


COLUMNS = {"image_column": "png", "text_columns": "json.captions"}


def shown(rows) -> list[tuple]:
    return [(row["image"].getpixel((0, 0)), tuple(row["text"])) for row in rows]


@pytest.fixture
def shards(tmp_path, bucket):
    """Five shards of four rows here, and their address."""
    write_webdataset(tmp_path / "shards", [4] * 5)
    return tmp_path / "shards", bucket.put(tmp_path / "shards", "shards")


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_give_the_rows_of_local_ones(shards, bucket, streaming):
    local, url = shards
    for place in ("", "/*.tar", "/003.tar"):
        here, there = (
            open_pairs(PairSource(source=f"{root}{place}", **COLUMNS, streaming=streaming, shuffle_buffer_size=3), 7)
            for root in (local, url)
        )
        assert shown(here) == shown(there) and len(shown(there)) == (4 if place == "/003.tar" else 20)
    assert set(bucket.entries()) == {f"shards/00{number}.tar" for number in range(5)}


@pytest.mark.parametrize("layout, streaming", [("parquet", False), ("parquet", True)])
def test_a_table_with_its_images(tmp_path, bucket, layout, streaming):
    source = write_layout(tmp_path / "local", layout)
    columns = {"image_column": source.image_column, "text_columns": source.text_columns, "streaming": streaming}
    url = bucket.put(tmp_path / "local", "table")
    assert shown(open_pairs(PairSource(source=url, **columns))) == shown(
        open_pairs(PairSource(source=source.source, **columns))
    )


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", "one\ntwo\n"),
        ("a.csv", "caption\none\ntwo\n"),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n'),
        ("a.json", '["one", "two"]'),
    ],
)
def test_texts(bucket, name, content):
    bucket.system.pipe_file(f"{bucket.url}/texts/{name}", content.encode())
    assert list(read_texts(f"{bucket.url}/texts/{name}")) == list(read_texts(f"{bucket.url}/texts")) == ["one", "two"]


def test_a_stream_larger_than_the_cache_is_read_with_several_workers(shards, bucket, monkeypatch):
    local, url = shards
    size = max(file.stat().st_size for file in local.iterdir())
    monkeypatch.setenv("PROCLIP_CACHE_SIZE", str(2 * size + 1))  # one for each worker
    stream = open_pairs(PairSource(source=url, **COLUMNS, streaming=True, shuffle_buffer_size=2), 7)
    loader = DataLoader(stream, batch_size=None, num_workers=2, collate_fn=_texts)
    assert sorted(loader) == sorted(captions(number)[0] for number in range(20))
    assert 1 <= len(bucket.entries()) <= 2


def _texts(row):
    return row["text"][0]


def test_a_shard_that_changes_during_training_is_named(shards, bucket):
    _, url = shards
    stream = open_pairs(PairSource(source=url, **COLUMNS, streaming=True, shuffle_buffer_size=2), 7)
    first = shown(stream)
    bucket.put(shards[0] / "004.tar", "shards/001.tar")
    stream.set_epoch(1)
    assert sorted(shown(stream)) == sorted(first)  # the version that it began with is in the cache
    for file in bucket.cache.glob("*/files/001.tar"):
        file.unlink()
    with pytest.raises(ValueError, match=f"{url}/001.tar has changed since it was listed"):
        shown(stream)


def test_a_damaged_shard_is_called_by_its_address(tmp_path, bucket):
    (path,) = write_webdataset(tmp_path / "shards", [4])
    path.write_bytes(path.read_bytes()[:3000])
    url = bucket.put(path, "a.tar")
    with pytest.raises(ValueError, match=f"{url} cannot be read to its end") as raised:
        list(iter_texts(PairSource(source=url, **COLUMNS)))
    assert str(bucket.cache) not in str(raised.value)


def test_a_table_without_a_column_of_the_first_is_named(bucket):
    bucket.system.pipe_file(f"{bucket.url}/tables/a.csv", b"text\none\n")
    bucket.system.pipe_file(f"{bucket.url}/tables/b.csv", b"caption\ntwo\n")
    with pytest.raises(ValueError, match="tables/b.csv has no column 'text', which files before it have"):
        list(read_texts(f"{bucket.url}/tables"))


def test_rows_in_an_object_store_name_no_files_of_this_machine(tmp_path, bucket):
    write_layout(tmp_path / "local", "jsonl")
    url = bucket.put(tmp_path / "local" / "pairs.jsonl", "pairs.jsonl")
    source = {"source": url, "image_column": "path"}
    with pytest.raises(
        ValueError, match="'0.png' is the name of a file, and rows in an object store have none beside"
    ):
        open_pairs(PairSource(**source))[0]
    with_folder = open_pairs(PairSource(**source, image_folder=str(tmp_path / "local")))
    assert len(shown(with_folder)) == 6


def test_splits_and_kinds_of_files_are_checked_as_in_a_folder(shards, bucket):
    local, url = shards
    for split in ("train", "val"):
        bucket.put(local / "000.tar", f"splits/{split}/0.tar")
    assert len(shown(open_pairs(PairSource(source=f"{bucket.url}/splits", split="val", **COLUMNS)))) == 4
    for source, message in [
        (PairSource(source=f"{bucket.url}/splits", split="test", **COLUMNS), "has no split 'test'"),
        (PairSource(source=f"{url}/*.tar", split="val", **COLUMNS), "whose only split is 'train', not 'val'"),
        (PairSource(source=bucket.put(local / "000.tar", "images/a.png")[:-6]), "holds no .tar.*pack images into"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_pairs(source)


def test_resuming_reads_the_same_batches(shards):
    stream = open_pairs(PairSource(source=shards[1], **COLUMNS, streaming=True, shuffle_buffer_size=3), 7)
    loader = StreamLoader(stream, 3, lambda rows: [row["text"] for row in rows])
    batches = iter(loader)
    [next(batches) for _ in range(4)]
    state = loader.state_dict()
    again = StreamLoader(stream, 3, loader.collate)
    again.load_state_dict(state)
    resumed = iter(again)
    assert [next(batches) for _ in range(5)] == [next(resumed) for _ in range(5)]
