"""A look-up gives the embedding that was asked for, or an error that names the file and the remedy: never another text's."""

import json
import logging
import os
import pickle
import shutil
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainers.fake_encoder import FakeEncoder, fake_embedding
from tests.trainers.tiny_encoders import make_texts
from trainers.data import TextEmbeddingStore
from trainers.storage.embedding_shard import blake2b
from trainers.storage.mapped_safetensors import DamagedFileError
from trainers.text_store import row_reader
from trainers.text_store.layout import warn_once


TEXTS = make_texts(48)
RIGHT = torch.stack([fake_embedding(text) for text in TEXTS])


@pytest.fixture
def path(encoder, tmp_path):
    """Three shards of 16."""
    encoder.build(TEXTS, tmp_path / "store", shard_size=16)
    return tmp_path / "store"


def change(file, tensor, edit):
    """`edit` gets the bytes of a tensor."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = (start + place for place in json.loads(data[8:start])[tensor]["data_offsets"])
    part = data[begin:end]
    edit(part)
    data[begin:end] = part
    file.write_bytes(data)


def flip(place, bit=0):
    def edit(data):
        data[place] ^= 1 << bit

    return edit


def exchange(size):
    def edit(data):
        data[:size], data[size : 2 * size] = data[size : 2 * size], data[:size]

    return edit


SHARD, INDEX = "shard-00000.safetensors", "index.safetensors"


@pytest.mark.parametrize(
    ("file", "tensor", "edit"),
    [
        (SHARD, "embeds", flip(3)),
        (SHARD, "embeds", flip(100, 7)),
        (SHARD, "embeds", exchange(24)),
        (SHARD, "keys", flip(5)),
        (SHARD, "keys", exchange(16)),
        (SHARD, "checksums", flip(9)),
        (INDEX, "rows", flip(0)),
        (INDEX, "rows", flip(6, 6)),
        (INDEX, "rows", flip(7, 7)),
        (INDEX, "rows", exchange(8)),
        (INDEX, "keys", flip(0)),
        (INDEX, "keys", flip(7, 6)),
        (INDEX, "keys", flip(48 * 8 + 3)),
        (INDEX, "keys", exchange(8)),
        (INDEX, "checksums", flip(2)),
        (INDEX, "checksums", exchange(8)),
    ],
)
@pytest.mark.parametrize("index_is_new", [False, True])
def test_what_has_changed_is_named(path, file, tensor, edit, index_is_new):
    change(path / file, tensor, edit)
    if index_is_new:
        (path / INDEX).unlink()
    try:
        found = TextEmbeddingStore(path).lookup(TEXTS)
    except DamagedFileError as error:
        assert str(error).startswith(f"{path / file} is damaged: ") and "Delete this file" in str(error)
    else:
        assert torch.equal(found, RIGHT)
        # The index has its own copies of keys and checksums.
        assert index_is_new if file == INDEX else tensor != "embeds"


def test_the_remedy_of_a_damaged_embedding(path, encoder):
    change(path / "shard-00001.safetensors", "embeds", flip(50))
    with pytest.raises(
        DamagedFileError, match="shard-00001.safetensors is damaged: the embedding in row 2 is not what"
    ) as error:
        TextEmbeddingStore(path).lookup(TEXTS)
    assert "build the store again with the same texts" in str(error.value)
    with pytest.raises(
        DamagedFileError, match="shard-00001.safetensors is damaged: the embedding in row 2 is not what"
    ):
        TextEmbeddingStore(path).statistics()
    (path / "shard-00001.safetensors").unlink()
    encoder.embedded.clear()
    assert torch.equal(encoder.build(TEXTS, path, shard_size=16).lookup(TEXTS), RIGHT)
    assert encoder.embedded == TEXTS[16:32]


def test_a_damaged_index_does_not_make_texts_missing(path, encoder):
    """A build would embed them again, and they would be there twice."""
    change(path / INDEX, "keys", flip(7, 6))
    for use in (lambda: TextEmbeddingStore(path).find(np.zeros((1, 2), np.int64)), lambda: encoder.build(TEXTS, path)):
        with pytest.raises(DamagedFileError, match="index.safetensors is damaged: its content has changed since"):
            use()
    (path / INDEX).unlink()
    encoder.embedded.clear()
    assert torch.equal(encoder.build(TEXTS, path).lookup(TEXTS), RIGHT) and not encoder.embedded


def test_shards_that_exchanged_their_names(path):
    reader = TextEmbeddingStore(path)
    reader.index  # noqa: B018
    a, b = path / "shard-00000.safetensors", path / "shard-00002.safetensors"
    a.rename(path / "aside")
    b.rename(a)
    (path / "aside").rename(b)
    assert torch.equal(TextEmbeddingStore(path).lookup(TEXTS), RIGHT)
    with pytest.raises(
        ValueError, match="was replaced by another file while the store was open. Open the store again"
    ):
        reader.lookup(TEXTS)


def test_an_index_of_another_store(path, encoder, tmp_path):
    encoder.build(TEXTS[::-1], tmp_path / "other", shard_size=16)
    shutil.copy(tmp_path / "other" / INDEX, path / INDEX)
    assert torch.equal(TextEmbeddingStore(path).lookup(TEXTS), RIGHT)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00003.safetensors"])
def test_a_shard_of_another_encoder_s_store(path, encoder, tmp_path, name):
    """Every row of it is sound by itself: the same texts, embedded by another model."""
    encoder.fingerprint |= {"model": "moved", "weights_sha256": "11"}
    encoder.build(TEXTS, tmp_path / "other", shard_size=16)
    shutil.copy(tmp_path / "other" / "shard-00001.safetensors", path / name)
    with pytest.raises(DamagedFileError, match=f"{name} is damaged: its embeddings were made by another encoder"):
        TextEmbeddingStore(path)


def test_a_shard_of_the_same_encoder_s_store_is_welcome(path, encoder, tmp_path):
    encoder.fingerprint |= {"model": "moved"}
    encoder.build(["another text"], tmp_path / "other", shard_size=16)
    shutil.copy(tmp_path / "other" / "shard-00000.safetensors", path / "shard-00003.safetensors")
    assert torch.equal(
        TextEmbeddingStore(path).lookup(["another text", *TEXTS])[1:], RIGHT
    ) and "another text" in TextEmbeddingStore(path)


@pytest.mark.parametrize("has_read", [False, True])
def test_a_shard_that_is_rebuilt_under_a_reader(path, encoder, has_read):
    reader = TextEmbeddingStore(path)
    reader.index  # noqa: B018
    if has_read:
        reader.lookup(TEXTS)
    (path / "shard-00001.safetensors").unlink()
    encoder.build(TEXTS[::-1], path, shard_size=16)  # its rows come in another order
    if has_read:
        assert torch.equal(reader.lookup(TEXTS), RIGHT)
    else:
        with pytest.raises(ValueError, match="shard-00001.safetensors was replaced by another file"):
            reader.lookup(TEXTS)
    assert torch.equal(pickle.loads(pickle.dumps(reader)).lookup(TEXTS), RIGHT)


def test_a_shard_that_is_rebuilt_with_other_bits(path, monkeypatch):
    """As another machine gives: the index, which knows the checksums, is made anew."""
    reader = TextEmbeddingStore(path)
    reader.index  # noqa: B018
    (path / "shard-00001.safetensors").unlink()
    FakeEncoder(monkeypatch, lambda text: fake_embedding(text) + 1e-6).build(TEXTS, path, shard_size=16)
    found = TextEmbeddingStore(path).lookup(TEXTS)
    assert torch.equal(found[:16], RIGHT[:16]) and not torch.equal(found[16:32], RIGHT[16:32])
    with pytest.raises(ValueError, match="shard-00001.safetensors was replaced by another file"):
        reader.lookup(TEXTS)


def test_a_file_that_is_overwritten_in_place_under_a_reader(path):
    reader = TextEmbeddingStore(path)
    reader.lookup(TEXTS)
    other = (path / "shard-00002.safetensors").read_bytes()
    with open(path / "shard-00001.safetensors", "r+b") as file:
        file.write(other)
    with pytest.raises(ValueError, match="shard-00001.safetensors was replaced by another file"):
        reader.lookup(TEXTS)
    os.truncate(path / INDEX, 600)
    with pytest.raises(DamagedFileError, match="index.safetensors is damaged: it has become shorter"):
        reader.lookup(TEXTS)


def test_many_threads_over_many_shards(encoder, tmp_path, monkeypatch):
    """More shards than may be open, and threads that want different ones."""
    texts = make_texts(400)
    encoder.build(texts, tmp_path, shard_size=2)
    monkeypatch.setattr(row_reader.resource, "getrlimit", lambda kind: (6, 6))
    store = TextEmbeddingStore(tmp_path)
    right, failed = torch.stack([fake_embedding(text) for text in texts]), []

    def read(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(30):
            some = torch.randint(len(texts), (50,), generator=generator).tolist()
            try:
                if not torch.equal(store.lookup([texts[i] for i in some]), right[some]):
                    failed.append("wrong rows")
            except (ValueError, OSError) as error:
                failed.append(str(error))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# --- Stores of an earlier release -------------------------------------------------------------------------------------------------------


def as_an_earlier_release_wrote_it(path):
    """Shards without checksums of rows, an index without any, format 2."""
    for file in sorted(path.glob("shard-*")):
        tensors = load_file(file)
        del tensors["checksums"]
        save_file(tensors, file, {"blake2b": json.dumps({name: blake2b(tensor) for name, tensor in tensors.items()})})
    tensors = load_file(path / INDEX)
    del tensors["checksums"]
    save_file(tensors, path / INDEX, {"shards_blake2b": "0" * 32})
    settings = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps({**settings, "format": 2}))


def test_an_old_store_is_read_and_filled_further_with_one_warning(path, encoder, caplog):
    caplog.set_level(logging.WARNING, "trainers")
    warn_once.cache_clear()
    as_an_earlier_release_wrote_it(path)
    assert torch.equal(TextEmbeddingStore(path).lookup(TEXTS), RIGHT)
    more = make_texts(60)[48:]
    encoder.embedded.clear()
    store = encoder.build([*TEXTS, *more], path)
    assert encoder.embedded == more
    assert torch.equal(
        store.lookup([*TEXTS, *more]), torch.cat([RIGHT, torch.stack([fake_embedding(t) for t in more])])
    )
    assert json.loads((path / "store.json").read_text())["format"] == 3
    messages = {record.getMessage() for record in caplog.records}
    assert len(caplog.records) == len(messages) == 2
    assert all(
        "shards of the text store" in message and "without checksums of their rows" in message for message in messages
    )


@pytest.mark.parametrize(
    ("file", "tensor", "edit"),
    [(INDEX, "rows", flip(0)), (INDEX, "rows", exchange(8)), (INDEX, "keys", flip(7, 6)), (SHARD, "keys", flip(5))],
)
def test_another_text_s_embedding_is_noticed_in_an_old_store(path, file, tensor, edit):
    as_an_earlier_release_wrote_it(path)
    TextEmbeddingStore(path).index  # noqa: B018 - made anew
    change(path / file, tensor, edit)
    with pytest.raises(DamagedFileError):
        TextEmbeddingStore(path).lookup(TEXTS)
