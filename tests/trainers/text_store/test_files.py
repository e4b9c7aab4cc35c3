"""The files of a text store: index, damage, full disks, and what memory they take."""

import errno
import json
import re
import resource
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import save

from tests.trainers.fake_encoder import FakeEncoder, contents, fake_embedding
from tests.trainers.tiny_encoders import make_texts
from trainers.data import TextEmbeddingStore
from trainers.storage.mapped_safetensors import MappedSafetensors
from trainers.text_store import build as store_build
from trainers.text_store import index as store_index
from trainers.text_store import row_reader
from trainers.text_store import store as text_store
from trainers.text_store.keys import text_keys


@pytest.mark.parametrize("change", ["delete", "truncate", "of_other_shards", "garbage"])
def test_index_is_made_anew(encoder, tmp_path, change):
    texts = make_texts(25)
    encoder.build(texts[:10], tmp_path)
    index = tmp_path / "index.safetensors"
    older = index.read_bytes()
    encoder.build(texts, tmp_path)
    right = index.read_bytes()
    if change == "delete":
        index.unlink()
    else:
        index.write_bytes({"truncate": right[:100], "of_other_shards": older, "garbage": b"\xff" * 500}[change])
    assert torch.equal(TextEmbeddingStore(tmp_path).lookup(texts), torch.stack([fake_embedding(t) for t in texts]))
    assert index.read_bytes() == right


def test_texts_that_share_the_first_half_of_their_key(encoder, tmp_path, monkeypatch):
    def colliding_keys(texts):
        keys = text_keys(texts).copy()
        keys[:, 0] %= 3
        return keys

    monkeypatch.setattr(text_store, "text_keys", colliding_keys)
    monkeypatch.setattr(store_build, "text_keys", colliding_keys)
    texts = make_texts(60)
    store = encoder.build([*texts[:50], *texts[:50]], tmp_path)
    assert len(store) == 50
    assert torch.equal(store.lookup(texts[:50]), torch.stack([fake_embedding(text) for text in texts[:50]]))
    assert [text in store for text in texts] == [True] * 50 + [False] * 10


def test_key_set_equals_a_python_set():
    generator = np.random.default_rng(0)
    ours, naive = store_build.KeySet(), set()
    for _ in range(50):
        keys = generator.integers(0, 12, (generator.integers(0, 9), 2))  # few values, so many share a half or both
        naive_answer = [tuple(key) in naive for key in keys.tolist()]
        assert ours.contains(keys).tolist() == naive_answer
        new = sorted({tuple(key) for key in keys.tolist()} - naive)
        ours.add(np.array(new, dtype=np.int64).reshape(-1, 2))
        naive |= set(new)
    assert len(ours._runs) <= 8


def test_a_damaged_shard_is_named_and_comes_back(encoder, tmp_path):
    texts = make_texts(25)
    encoder.build(texts, tmp_path)
    before, shard = contents(tmp_path), tmp_path / "shard-00001.safetensors"
    whole = shard.read_bytes()
    other_tensors = save({"x": torch.zeros(3)})
    other_dim = save({"embeds": torch.zeros(4, 2), "keys": torch.zeros(4, 2, dtype=torch.int64)})
    no_header = (10**12).to_bytes(8, "little") + whole[8:]
    bad_json = whole[:20] + b"\xff" + whole[21:]
    for data in (whole[:-1], whole + b"0", whole[:30], b"", no_header, bad_json, other_tensors, other_dim):
        shard.write_bytes(data)
        for use in (lambda: TextEmbeddingStore(tmp_path), lambda: encoder.build(texts, tmp_path)):
            with pytest.raises(ValueError, match="shard-00001.safetensors is damaged: .* Delete this file"):
                use()
    shard.unlink()
    encoder.embedded.clear()
    store = encoder.build(texts, tmp_path)
    assert encoder.embedded == texts[10:20]
    assert contents(tmp_path) == before
    assert torch.equal(store.lookup(texts), torch.stack([fake_embedding(text) for text in texts]))


def test_what_is_no_store_is_refused_and_left_alone(encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a text store: it has no store.json"):
        TextEmbeddingStore(tmp_path / "nowhere")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not a text store .* holds other files such as 'thesis.tex'"):
        encoder.build(["fox"], tmp_path)
    assert list(contents(tmp_path)) == ["thesis.tex"]
    with pytest.raises(ValueError, match="thesis.tex is a file"):
        encoder.build(["fox"], tmp_path / "thesis.tex")
    encoder.build(["fox"], tmp_path / "store")
    settings = tmp_path / "store" / "store.json"
    good = json.loads(settings.read_text())
    for bad in ("{", "[]", json.dumps({**good, "format": 1}), json.dumps({**good, "dtype": "int4"}), "{}"):
        settings.write_text(bad)
        with pytest.raises(ValueError, match="store.json cannot be read"):
            TextEmbeddingStore(tmp_path / "store")


def test_what_a_killed_writer_left_is_deleted(encoder, tmp_path):
    encoder.build(["fox"], tmp_path)
    before = contents(tmp_path)
    for name in ("writer-0-of-1.tmp", "writer-3-of-8.tmp"):
        (tmp_path / name).write_bytes(b"half a shard")
    assert len(TextEmbeddingStore(tmp_path)) == 1
    encoder.build(["fox"], tmp_path)
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_no_half_shard(encoder, tmp_path):
    texts = make_texts(300)
    encoder.build(texts[:10], tmp_path)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails as it does on a full disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        with pytest.raises(OSError, match="could not be written .*shard") as error:
            encoder.build(texts, tmp_path, shard_size=300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG
    assert contents(tmp_path) == before
    assert len(encoder.build(texts, tmp_path)) == 300


def test_memory_does_not_grow_with_what_was_looked_up(monkeypatch, tmp_path):
    """A store of 64 MiB, all of which is looked up, in pieces."""
    rows, dim = 4096, 4096
    encoder = FakeEncoder(monkeypatch, lambda text: torch.full((dim,), float(text)))
    encoder.build([str(i) for i in range(rows)], tmp_path, shard_size=rows // 2)
    store = TextEmbeddingStore(tmp_path)
    store.lookup(["0"])

    def resident() -> int:
        with open("/proc/self/status") as lines:
            return int(re.search(r"VmRSS:\s+(\d+) kB", lines.read())[1])

    before = resident()
    for begin in range(0, rows, 64):
        texts = [str((7 * i) % rows) for i in range(begin, begin + 64)]
        assert store.lookup(texts)[:, 9].tolist() == [float(text) for text in texts]
    store.statistics()
    grown = resident() - before
    assert grown < 24_000, f"{grown} kB; a block of statistics takes 64 MiB and is gone again"


def test_a_process_may_have_few_open_files(encoder, tmp_path, monkeypatch):
    texts = make_texts(300)
    encoder.build(texts, tmp_path, shard_size=2)
    monkeypatch.setattr(row_reader.resource, "getrlimit", lambda kind: (6, 6))
    store = TextEmbeddingStore(tmp_path)
    assert torch.equal(store.lookup(texts[::-1]), torch.stack([fake_embedding(text) for text in texts[::-1]]))
    assert store._reader._open.cache_info().currsize == 3


def test_a_shard_that_becomes_shorter_while_it_is_used_is_named(encoder, tmp_path):
    texts = make_texts(10)
    encoder.build(texts, tmp_path)
    store = TextEmbeddingStore(tmp_path)
    (shard,) = tmp_path.glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-300])
    with pytest.raises(ValueError, match="it has become shorter since it was opened"):
        store.lookup(texts)
    with pytest.raises(ValueError, match="it has become shorter since it was opened"):
        store.statistics()


@pytest.mark.parametrize("keys_in_memory", [7, 50, 1000])
def test_an_index_made_in_parts_is_the_same(encoder, tmp_path, keys_in_memory):
    texts = make_texts(100)
    store = encoder.build(texts, tmp_path, shard_size=30)
    whole = (tmp_path / "index.safetensors").read_bytes()
    keys = np.concatenate([shard.read("keys").numpy() for shard in store.shards])
    order = sorted(range(100), key=lambda row: tuple(keys[row]))
    assert store.index.rows.tolist() == order and store.index.keys.T.tolist() == keys[order].tolist()
    (tmp_path / "index.safetensors").unlink()
    store_index.write_index(tmp_path, store.shards, keys_in_memory)
    assert (tmp_path / "index.safetensors").read_bytes() == whole


def test_opening_a_store_reads_no_key(encoder, tmp_path, monkeypatch):
    texts = make_texts(20)
    encoder.build(texts, tmp_path)
    monkeypatch.setattr(MappedSafetensors, "read", lambda *args: 1 / 0)
    assert len(TextEmbeddingStore(tmp_path).lookup(texts)) == 20


def test_a_store_that_cannot_be_written_is_read(encoder, tmp_path, monkeypatch, caplog):
    texts = make_texts(20)
    encoder.build(texts, tmp_path)
    (tmp_path / "index.safetensors").unlink()

    def read_only(*args):
        raise PermissionError(errno.EACCES, "read-only")

    monkeypatch.setattr(store_index, "write_index", read_only)
    assert torch.equal(TextEmbeddingStore(tmp_path).lookup(texts), torch.stack([fake_embedding(t) for t in texts]))
    assert "is kept in memory, because it cannot be written" in caplog.text


def test_size_and_time_are_estimated(encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store_build, "_WORTH_ESTIMATING", 100)
    encoder.build(make_texts(150), tmp_path / "a", progress=True, shard_size=100)
    said = capsys.readouterr().err
    assert "150 texts to embed at most: 0.00 GB on the disk (6 float32; " in said and "texts/s" in said
    assert encoder.embedded[:64] == encoder.embedded[64:164][:64], "by a sample of the first texts"
    line = store_build.estimate(tmp_path, 10**6, ["fox"], lambda texts: [Batch()], "float16", 4)
    assert line.startswith("1,000,000 texts to embed at most: 1.21 GB on the disk (576 float16; ")
    encoder.embedded.clear()
    monkeypatch.setattr(store_build.shutil, "disk_usage", lambda path: Usage(free=9000))
    with pytest.raises(OSError, match="there is too little room: 150 texts .* 0.00 GB are free.*float16") as error:
        encoder.build(make_texts(150), tmp_path / "b")
    assert error.value.errno == errno.ENOSPC and len(encoder.embedded) <= 64
    assert not list((tmp_path / "b").glob("shard-*"))
    encoder.build(make_texts(150)[:75], tmp_path / "c")
    assert len(encoder.build(make_texts(150), tmp_path / "c")) == 150, "for those that are not there yet there is room"


def test_size_on_the_disk_is_as_estimated(encoder, tmp_path):
    store = encoder.build(make_texts(2000), tmp_path, shard_size=1000, dtype="bfloat16")
    assert store.num_bytes == pytest.approx(2000 * store_build.bytes_of_text(6, "bfloat16"), rel=0.03)


class Batch:
    embeddings = torch.zeros(1, 576)


class Usage:
    def __init__(self, free):
        self.free = free
