"""What a verification finds, and that its remedies help."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.trainers.fake_encoder import FakeEncoder, contents, fake_embedding
from tests.trainers.tiny_encoders import make_texts, tiny_proclip
from trainers.data import TextEmbeddingStore
from trainers.text_store import index as store_index
from trainers.text_store.layout import INDEX_REMEDY, open_shard, store_lock, writer
from trainers.text_store.verify import verify_store


TEXTS = make_texts(30)


@pytest.fixture
def path(encoder, tmp_path):
    """A sound store of three shards."""
    encoder.build(TEXTS, tmp_path / "store")
    return tmp_path / "store"


def problems(path, *args, **kwargs) -> list[str]:
    return verify_store(path, *args, progress=False, **kwargs).problems


def test_a_sound_store(path):
    before = contents(path)
    found = verify_store(path, progress=False)
    assert (found.problems, found.num_texts, found.num_shards, found.num_compared) == ([], 30, 3, 0)
    assert contents(path) == before
    (path / "index.safetensors").unlink()
    assert problems(path) == [] and contents(path) == before


@pytest.mark.parametrize(
    "tensor, reason",
    [
        ("embeds", "its embeds have changed since they were written"),
        ("keys", "its keys have changed since they were written"),
        ("checksums", "the embedding in row 0 is not what was written there"),
    ],
)
def test_one_bit_that_has_changed(path, encoder, tensor, reason):
    whole, shard = contents(path), path / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[open_shard(shard, 6, "float32").offset(tensor) + 5] ^= 4
    shard.write_bytes(data)
    (problem,) = problems(path)
    assert problem.startswith(f"{shard} is damaged: {reason}. Delete this file")
    shard.unlink()
    encoder.embedded.clear()
    encoder.build(TEXTS, path)
    assert encoder.embedded == TEXTS[10:20] and contents(path) == whole and problems(path) == []


def test_a_shard_that_is_cut_short(path):
    shard = path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    (path / "shard-00002.safetensors").write_bytes(b"")
    found = problems(path)
    assert len(found) == 2 and all("safetensors is damaged: it" in problem for problem in found)


def test_embeddings_that_are_not_finite(path):
    shard = path / "shard-00001.safetensors"
    tensors = load_file(shard)
    with writer(path, 0, 1) as this:
        shard.unlink()
        tensors["embeds"][3] = float("nan")
        this.write_shard(tensors["embeds"], tensors["keys"].numpy())
    (problem,) = problems(path)
    assert problem.startswith(f"{shard} holds 1 embeddings that are not finite. Delete this file")


def test_texts_that_are_there_twice(path):
    tensors = load_file(path / "shard-00001.safetensors")
    with writer(path, 0, 1) as this:
        this.write_shard(tensors["embeds"][:4].clone(), tensors["keys"][:4].numpy())
    assert [problem.split(" in ")[0] for problem in problems(path)] == ["4 texts or more are"]
    assert torch.equal(TextEmbeddingStore(path).lookup(TEXTS), torch.stack([fake_embedding(text) for text in TEXTS]))


@pytest.mark.parametrize(("change", "message"), [("order", "is not sorted"), ("rows", "does not know where")])
def test_an_index_that_was_written_wrong(path, change, message, monkeypatch):
    def wrong(*args):
        for part in sorted_parts(*args):
            places = part[:2] if change == "order" else part[2:3]
            places[:, [4, 20]] = places[:, [20, 4]]
            yield part

    sorted_parts = store_index._sorted_parts
    monkeypatch.setattr(store_index, "_sorted_parts", wrong)
    store_index.write_index(path, TextEmbeddingStore(path).shards)
    monkeypatch.undo()
    (problem,) = problems(path)
    assert message in problem and "Delete this file" in problem
    (path / "index.safetensors").unlink()
    assert problems(path) == []


@pytest.mark.parametrize("tensor", ["keys", "rows", "checksums"])
def test_one_bit_of_the_index_that_has_changed(path, tensor):
    file = path / "index.safetensors"
    data = bytearray(file.read_bytes())
    data[TextEmbeddingStore(path).index.file.offset(tensor) + 5] ^= 4
    file.write_bytes(data)
    assert problems(path) == [f"{file} is damaged: its content has changed since it was written. {INDEX_REMEDY}"]


def test_an_index_that_is_cut_short(path):
    file = path / "index.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert problems(path) == [f"{file} is damaged: it has 1,384 bytes where its header tells of 1,392. {INDEX_REMEDY}"]


def test_embeddings_are_compared_with_what_the_model_says(tmp_path):
    model, processor = tiny_proclip()
    store = TextEmbeddingStore.build(TEXTS, model, processor, tmp_path, dtype="bfloat16", progress=False)
    found = verify_store(tmp_path, TEXTS, model, processor, num_compared=10, progress=False)
    assert (found.problems, found.num_compared) == ([], 10) and 0.999 < found.smallest_cosine <= 1
    (problem,) = problems(tmp_path, [*TEXTS, "unheard of"], model, processor)
    assert problem.startswith("1 of the texts are not in the text store")
    with pytest.raises(ValueError, match="made by another encoder: pooling is 'mean' there"):
        problems(tmp_path, TEXTS, tiny_proclip(text_pooling="last_token")[0], processor)

    (file,) = tmp_path.glob("shard-*")
    tensors, keys = load_file(file), store.shards[0].read("keys").numpy()
    file.unlink()
    with writer(tmp_path, 0, 1) as this:
        this.write_shard(tensors["embeds"].roll(1, dims=0), keys)
    found = problems(tmp_path, TEXTS, model, processor, num_compared=3)
    assert len(found) == 3 and all("is not what the model gives now" in problem for problem in found)


def test_two_stores_of_the_same_texts_become_one_by_moving_files(monkeypatch, tmp_path):
    """What was embedded elsewhere needs no copying: its shards are moved, under names that are free."""
    FakeEncoder(monkeypatch).build(TEXTS[:20], tmp_path / "a")
    FakeEncoder(monkeypatch).build(TEXTS[20:], tmp_path / "b")
    with store_lock(tmp_path / "a"):
        shutil.move(tmp_path / "b" / "shard-00000.safetensors", tmp_path / "a" / "shard-00777.safetensors")
    store = TextEmbeddingStore(tmp_path / "a")
    assert len(store) == 30 and problems(tmp_path / "a") == []
    np.testing.assert_array_equal(store.lookup(TEXTS), torch.stack([fake_embedding(text) for text in TEXTS]))
