"""Text stores in an object store: opened, grown, verified and refused as local ones are, and never written."""

import pickle

import fsspec
import pytest
import torch

from tests.trainers.fake_encoder import contents
from trainers.data import TextEmbeddingStore
from trainers.data.text_files import divide_texts
from trainers.text_store.ray_workers import build_with_ray
from trainers.text_store.verify import verify_store


TEXTS = [f"text {number}" for number in range(25)]


@pytest.fixture
def local(encoder, tmp_path):
    return encoder.build(TEXTS, tmp_path / "local")


def test_a_remote_store_gives_what_the_local_one_gives(bucket, local):
    url = bucket.put(local.path, "stores/captions")
    store = TextEmbeddingStore(url)
    assert torch.equal(store.lookup(TEXTS[::-1]), local.lookup(TEXTS[::-1]))
    assert torch.equal(pickle.loads(pickle.dumps(store)).lookup(TEXTS), local.lookup(TEXTS))
    assert (len(store), store.fingerprint, store.place) == (25, local.fingerprint, url)
    files = {"store.json", "index.safetensors", *(f"shard-0000{number}.safetensors" for number in range(3))}
    assert bucket.entries() == {"stores/captions/": files}
    with pytest.raises(KeyError, match=f"not in the text store {url}: 'another'.*only read: download it"):
        store.lookup(["another"])
    assert verify_store(url, progress=False).problems == []


def test_a_store_that_has_grown_costs_its_new_shards(bucket, encoder, local):
    url = bucket.put(local.path, "store")
    before = TextEmbeddingStore(url)
    grown = encoder.build([*TEXTS, "a new text"], local.path)
    bucket.put(grown.path, "store")
    bucket.system.rm(f"{url}/index.safetensors")  # a store is uploaded without it too
    kept = before.path / "shard-00000.safetensors"
    inode = kept.stat().st_ino
    after = TextEmbeddingStore(url)
    assert len(after) == 26 and kept.stat().st_ino == inode
    assert torch.equal(after.lookup(["a new text", *TEXTS]), grown.lookup(["a new text", *TEXTS]))
    assert torch.equal(before.lookup(TEXTS), local.lookup(TEXTS))


def test_building_into_an_object_store_only_checks_that_nothing_is_missing(bucket, encoder, local):
    url, before = bucket.put(local.path, "store"), contents(local.path)
    encoder.embedded.clear()
    summary = encoder.build([*TEXTS, TEXTS[0]], url).build_summary
    assert (summary.num_texts, summary.num_stored, summary.num_new, encoder.embedded) == (26, 26, 0, [])
    with pytest.raises(ValueError, match=f"1 of the texts are not in the text store {url}: 'b'.*only read"):
        encoder.build(["b"], url)
    with pytest.raises(FileNotFoundError, match=f"there is nothing at {bucket.url}/other"):
        encoder.build(["b"], f"{bucket.url}/other")
    encoder.fingerprint["pooling"] = "last"
    with pytest.raises(ValueError, match=f"the text store {url} was made by another encoder: pooling"):
        encoder.build(TEXTS, url)
    assert {file.removeprefix(f"{url[5:]}/") for file in bucket.system.find(url)} == before.keys() | {
        "locks/index",
        "locks/store",
        "locks/writer-0-of-1",
    }


def test_tasks_read_texts_from_a_bucket_and_fill_a_directory(bucket, encoder, tmp_path, monkeypatch):
    for number in range(3):
        lines = "".join(f"{text}\n" for text in TEXTS[number::3])
        bucket.system.pipe_file(f"{bucket.url}/texts/{number}.txt", lines.encode())
    texts = divide_texts(f"{bucket.url}/texts")
    store = encoder.build(texts, tmp_path / "store", num_tasks=2)
    assert len(store) == 25 and sorted(encoder.embedded) == sorted(TEXTS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"only read: fill one in a directory and copy it to {bucket.url}/store"):
        encoder.build(texts, f"{bucket.url}/store", num_tasks=2)
    with pytest.raises(ValueError, match=f"only read: fill one in a directory and copy it to {bucket.url}/store"):
        build_with_ray(texts, lambda: (None, None), f"{bucket.url}/store")
    assert not (tmp_path / "s3:").exists()


def test_what_is_no_store_or_damaged_is_named(bucket, local):
    with pytest.raises(FileNotFoundError, match=f"{bucket.url}/folder is not a text store"):
        TextEmbeddingStore(
            bucket.put(local.path / "shard-00000.safetensors", "folder/a.safetensors")[: -len("/a.safetensors")]
        )
    url = bucket.put(local.path, "store")
    store = TextEmbeddingStore(url)
    shard = store.path / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-200] ^= 1
    bucket.system.pipe_file(f"{url}/{shard.name}", bytes(data))
    changed = TextEmbeddingStore(url)
    with pytest.raises(ValueError, match="shard-00001.safetensors is damaged"):
        changed.lookup(TEXTS)
    (problem,) = verify_store(url, progress=False).problems
    assert shard.name in problem and f"copy of {url}" in problem


def test_a_store_in_memory(local, tmp_path, monkeypatch):
    monkeypatch.setenv("PROCLIP_CACHE", str(tmp_path / "cache-of-files"))
    for name, data in contents(local.path).items():
        fsspec.filesystem("memory").pipe_file(f"/stores/a/{name}", data)
    assert torch.equal(TextEmbeddingStore("memory://stores/a").lookup(TEXTS), local.lookup(TEXTS))


def test_a_store_that_does_not_fit_into_the_cache_is_refused(bucket, local, monkeypatch):
    url = bucket.put(local.path, "store")
    monkeypatch.setenv("PROCLIP_CACHE_SIZE", "1 KB")
    with pytest.raises(OSError, match=f"{url}/ has 0.00 GB, which do not fit into the cache .*PROCLIP_CACHE_SIZE"):
        TextEmbeddingStore(url)
