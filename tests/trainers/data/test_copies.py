"""Copies of rows by number belong to what the files hold, survive kills and several processes, and stay on the disk."""

import json
import multiprocessing
import os
import pickle
from pathlib import Path

import datasets
import pytest

from tests.trainers.data.test_archives import pack, rows_of
from tests.trainers.tiny_pairs import picture
from trainers.data import PairSource, copies, iter_texts, open_pairs
from trainers.data.text_files import read_texts
from trainers.evaluation.data.manifest import Data, Manifest
from trainers.evaluation.data.sources import open_data
from trainers.storage import digests
from trainers.storage.digests import file_digest


def write(file: Path, words: str) -> None:
    """Rows of `words` in `file`, of the same size and time whatever the words are."""
    texts = [f"{words} {i}" for i in range(4)]
    if file.suffix == ".csv":
        file.write_text("text\n" + "".join(f"{text}\n" for text in texts))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif file.suffix == ".json":
        file.write_text(json.dumps([{"text": text} for text in texts]))
    elif file.suffix == ".parquet":
        datasets.Dataset.from_dict({"text": texts}).to_parquet(file)
    elif file.suffix == ".tar":
        pack(file, {f"{i}.text": text.encode() for i, text in enumerate(texts)})
    else:
        file.mkdir(exist_ok=True)
        for i in range(4):
            picture(i).save(file / f"{i}.png")
        rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(texts)]
        (file / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        file = file / "metadata.jsonl"
    os.utime(file, (1_700_000_000, 1_700_000_000))


def evaluated(file: Path) -> str:
    data = Data(source=str(file), split="train")
    manifest = Manifest(
        name="m", title="m", kind="caption_retrieval", group="own", data=data, columns={"captions": "text"}
    )
    return open_data(manifest).rows[0]["text"]


READERS = {
    "by number": lambda file: open_pairs(PairSource(source=str(file)), images=False)[0]["text"][0],
    "streaming": lambda file: next(iter(open_pairs(PairSource(source=str(file), streaming=True), images=False)))[
        "text"
    ][0],
    "iter_texts": lambda file: next(iter_texts(PairSource(source=str(file)))),
    "embed": lambda file: next(iter(read_texts(file))),
    "evaluate": evaluated,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet", "a.tar", "folder"])
def test_a_file_that_was_replaced_under_its_name_and_time_is_read(tmp_path, name, reader):
    for words in ("old", "new", "old"):
        write(tmp_path / name, words)
        assert READERS[reader](tmp_path / name).startswith(words)


def test_a_copy_is_made_once(tmp_path, cache, monkeypatch):
    write(tmp_path / "a.csv", "a")
    source = PairSource(source=str(tmp_path / "a.csv"))
    open_pairs(source, images=False)
    monkeypatch.setattr(copies, "_write", lambda *args: 1 / 0)
    assert open_pairs(source, images=False)[2] == {"text": ["a 2"]}
    assert len(list(cache.rglob("*.arrow"))) == 1
    write(tmp_path / "a.csv", "b")
    with pytest.raises(ZeroDivisionError):
        open_pairs(source, images=False)


def test_rows_stay_on_the_disk_and_travel_to_data_workers(tmp_path):
    pack(tmp_path / "a.tar", rows_of(*range(50)))
    rows = open_pairs(PairSource(source=str(tmp_path), image_column="png", text_columns="txt"))
    assert rows.rows.table.cache_files and rows.rows.table.data.nbytes > 5000
    assert len(pickle.dumps(rows.rows)) < 5000, "the rows are mapped, not sent"
    assert pickle.loads(pickle.dumps(rows.rows)).table[7]["txt"] == "caption 7"


def test_a_copy_that_was_interrupted_is_made_again(tmp_path, cache, monkeypatch):
    for name in "abc":
        write(tmp_path / f"{name}.csv", name)
    source = PairSource(source=str(tmp_path / "*.csv"))
    real = copies.read_rows

    def interrupted(shards, columns):
        for number, row in enumerate(real(shards, columns)):
            if row["text"].startswith("c") and number == 2:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(copies, "read_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_pairs(source, images=False)
    assert len(list(cache.rglob("*.arrow"))) == 2 and not list(cache.rglob("*.tmp"))
    (cache / "proclip" / "0.arrow.tmp").write_bytes(b"left over by a kill")
    made = []
    monkeypatch.setattr(copies, "read_rows", lambda shards, columns: made.extend(shards) or real(shards, columns))
    rows = open_pairs(source, images=False)
    assert [rows[i]["text"][0] for i in range(12)] == [f"{name} {i}" for name in "abc" for i in range(4)]
    assert [shard.name for shard in made] == ["c.csv"]


def _cut_between_batches(content: bytes) -> bytes:
    """The first of several batches, which Arrow reads as a sound stream."""
    return content[: content.rfind(b"\xff\xff\xff\xff", 0, len(content) - 20)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        _cut_between_batches,
        lambda content: content.replace(b"caption 17", b"caption 97"),
        lambda content: b"",
    ],
    ids=["cut short", "cut between batches", "other bytes", "empty"],
)
def test_a_copy_that_was_damaged_is_made_again(tmp_path, cache, monkeypatch, caplog, damage):
    texts = [f"caption {i}" for i in range(1500)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = PairSource(source=str(file))
    open_pairs(source, images=False)
    (copy,) = cache.rglob("*.arrow")
    sound = copy.read_bytes()
    copy.unlink()  # what this process has mapped stays
    copy.write_bytes(damage(sound))
    rows = open_pairs(source, images=False)
    assert [rows[i]["text"] for i in range(len(rows))] == [[text] for text in texts]
    assert copy.read_bytes() == sound and "is missing or has changed: making it again" in caplog.text


def test_many_files_share_copies(tmp_path, cache):
    for number in range(150):
        (tmp_path / f"{number:03d}.jsonl").write_text(json.dumps({"text": f"text {number}"}))
    rows = open_pairs(PairSource(source=str(tmp_path)), images=False)
    assert [rows[i]["text"][0] for i in range(150)] == [f"text {i}" for i in range(150)]
    assert len(list(cache.rglob("*.arrow"))) <= 64


def _open(folder: str, cache: str, results) -> None:
    datasets.config.HF_DATASETS_CACHE = cache
    rows = open_pairs(PairSource(source=folder), images=False)
    results.put([rows[i]["text"][0] for i in range(len(rows))])


def test_two_processes_at_once(tmp_path, cache):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20_000)))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_open, args=(str(tmp_path), str(cache), results)) for _ in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        assert results.get(timeout=60) == [f"text {i}" for i in range(20_000)]
    for process in processes:
        process.join()
    assert len(list(cache.rglob("*.arrow"))) == 1


def test_a_full_disk_leaves_nothing(tmp_path, cache, monkeypatch):
    write(tmp_path / "a.csv", "a")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.ipc.new_stream", full)
    with pytest.raises(OSError, match="No space left"):
        open_pairs(PairSource(source=str(tmp_path / "a.csv")), images=False)
    assert not list(cache.rglob("*.arrow")) and not list(cache.rglob("*.tmp"))


def test_a_column_of_two_types_is_named(tmp_path):
    datasets.Dataset.from_dict({"image": ["0.png"], "text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"image": ["1.png"], "text": [7]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet, row 1"):
        rows = open_pairs(PairSource(source=str(tmp_path)), images=False)
        rows[1]


def test_the_digest_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "known", {})
    file = tmp_path / "a"
    file.write_bytes(b"one")
    first = file_digest(file)
    assert first == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert not digests.known, "it may change again within the clock's resolution"
    monkeypatch.setattr(digests, "_SETTLED", -1.0)
    assert file_digest(file) == first and digests.known
    status = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_digest(file) != first
