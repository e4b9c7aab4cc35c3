import errno
import json
import pickle
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.trainers.tiny_encoders import make_texts, tiny_clip, tiny_proclip
from trainers.data import TextEmbeddingStore, encode_texts, store_files, text_store
from trainers.data.text_encoding import EncodedBatch


DIM = 6


def fake_embedding(text: str) -> torch.Tensor:
    seed = int.from_bytes(text.encode()[:7], "little")
    return torch.randn(DIM, generator=torch.Generator().manual_seed(seed)) + 3


class FakeEncoder:
    """Stands in for model and processor where only the files matter. Counts the texts that it embeds."""

    def __init__(self, monkeypatch, embed=fake_embedding):
        self.embedded: list[str] = []
        self.fingerprint = {
            "model": "a",
            "revision": None,
            "weights_sha256": "00",
            "pooling": "mean",
            "max_length": 64,
        }

        def encode(texts, model, processor, *, token_budget):
            self.embedded += texts
            for indices in torch.randperm(len(texts)).split(7):
                yield EncodedBatch(indices.tolist(), torch.stack([embed(texts[i]) for i in indices]), 0)

        monkeypatch.setattr(text_store, "encode_texts", encode)
        monkeypatch.setattr(text_store, "encoder_fingerprint", lambda model, processor: dict(self.fingerprint))

    def build(self, texts, path, **kwargs) -> TextEmbeddingStore:
        return TextEmbeddingStore.build(texts, None, None, path, **{"shard_size": 10, "progress": False, **kwargs})


@pytest.fixture
def encoder(monkeypatch):
    return FakeEncoder(monkeypatch)


def contents(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_stores_what_the_llm_says(tmp_path):
    model, processor = tiny_proclip()
    texts = make_texts(30)
    store = TextEmbeddingStore.build(iter(texts), model, processor, tmp_path, shard_size=8, token_budget=100)
    naive = {}
    for text in texts:
        with torch.no_grad():
            naive[text] = model.get_llm_embeds(**processor(text=[text], return_tensors="pt"))[0]
    for asked in (texts, texts[::-1], [texts[20], texts[3], texts[20]], []):
        expected = torch.stack([naive[text] for text in asked]) if asked else torch.empty(0, 32)
        torch.testing.assert_close(store.lookup(asked), expected, atol=1e-5, rtol=1e-5)
    assert (len(store), store.dim, store.dtype) == (30, 32, torch.float32)
    assert texts[7] in store and "nothing of the kind" not in store
    assert store.fingerprint["prompt_template"] == processor.prompt_template


def test_stores_what_a_clip_says(tmp_path):
    model, tokenizer = tiny_clip()
    texts = make_texts(10)
    store = TextEmbeddingStore.build(texts, model, tokenizer, tmp_path)
    with torch.no_grad():
        expected = model.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
    torch.testing.assert_close(store.lookup(texts), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(encoder, tmp_path, dtype):
    texts = make_texts(25)
    encoder.build(texts, tmp_path, dtype=dtype)
    found = TextEmbeddingStore(tmp_path).lookup(texts)
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, torch.stack([fake_embedding(text) for text in texts]).to(found.dtype))


def test_lookup_equals_a_dict_over_many_shards(encoder, tmp_path):
    texts = make_texts(1000)
    store = encoder.build(texts, tmp_path, shard_size=37)
    naive = {text: fake_embedding(text) for text in texts}
    for seed in range(3):
        asked = [texts[i] for i in torch.randint(1000, (500,), generator=torch.Generator().manual_seed(seed))]
        assert torch.equal(store.lookup(asked), torch.stack([naive[text] for text in asked]))


def test_repeated_and_stored_texts_are_embedded_once(encoder, tmp_path):
    texts = make_texts(30)
    first = encoder.build([*texts[:20], *texts[:20]], tmp_path)
    assert encoder.embedded == texts[:20]
    summary = first.build_summary
    assert (summary.num_texts, summary.num_new, summary.num_stored, summary.num_repeated) == (40, 20, 0, 20)
    second = encoder.build((text for text in [*texts, texts[29]]), tmp_path)
    assert encoder.embedded == texts
    summary = second.build_summary
    assert (summary.num_texts, summary.num_new, summary.num_stored, summary.num_repeated) == (31, 10, 20, 1)
    assert torch.equal(second.lookup(texts), torch.stack([fake_embedding(text) for text in texts]))
    assert len(first) == 20 and len(second) == 30, "an open store does not change"


def test_rows_are_in_input_order(encoder, tmp_path):
    texts = make_texts(25)
    store = encoder.build(texts, tmp_path)
    assert [file.name for file in store_files.shard_paths(tmp_path)] == [
        f"shard-0000{i}.safetensors" for i in range(3)
    ]
    assert torch.equal(store._shards[1].tensor("embeds"), torch.stack([fake_embedding(text) for text in texts[10:20]]))


def test_missing_texts_are_named(encoder, tmp_path):
    store = encoder.build(make_texts(5), tmp_path)
    with pytest.raises(KeyError) as error:
        store.lookup([*make_texts(5), "fox", "fox", "boat", "r" * 200, "river"])
    message = error.value.args[0]
    assert message.startswith(f"4 of the texts are not in the text store {tmp_path}: 'fox', 'boat', 'rrr")
    assert "river" not in message and len(message) < 300 + len(str(tmp_path)) and "proclip embed" in message


def test_refuses_what_are_no_texts(encoder, tmp_path):
    with pytest.raises(TypeError, match="not one string"):
        encoder.build("fox", tmp_path)
    with pytest.raises(TypeError, match="text number 1 is no string but NoneType"):
        encoder.build(["fox", None], tmp_path)
    with pytest.raises(ValueError, match="text number 0 is no valid Unicode"):
        encoder.build(["\ud800"], tmp_path)
    with pytest.raises(TypeError, match="not one string"):
        encoder.build(["fox"], tmp_path).lookup("fox")


def test_refuses_wrong_settings(encoder, tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, got 'int8'"):
        encoder.build(["fox"], tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="shard_size must be at least 1, got 0"):
        encoder.build(["fox"], tmp_path, shard_size=0)


def test_workers_of_a_data_loader_can_use_it(encoder, tmp_path):
    texts = make_texts(20)
    store = encoder.build(texts, tmp_path)
    assert torch.equal(pickle.loads(pickle.dumps(store)).lookup(texts), store.lookup(texts))
    assert len(pickle.dumps(store)) < 1000
    loader = DataLoader(texts, batch_size=5, num_workers=1, collate_fn=store.lookup)
    assert torch.equal(torch.cat(list(loader)), store.lookup(texts))


def test_statistics_equal_torch(encoder, tmp_path):
    texts = make_texts(100)
    store = encoder.build(texts, tmp_path, shard_size=33)
    everything = torch.stack([fake_embedding(text) for text in texts]).double()
    mean, std = store.statistics()
    assert mean.dtype == std.dtype == torch.float64
    torch.testing.assert_close(mean, everything.mean(dim=0), atol=1e-12, rtol=0)
    torch.testing.assert_close(std, everything.std(dim=0, correction=0), atol=1e-12, rtol=0)


def test_statistics_do_not_cancel_far_from_zero(monkeypatch, tmp_path):
    encoder = FakeEncoder(monkeypatch, lambda text: torch.full((1,), 1e6) + (int(text) % 2))
    _, std = encoder.build([str(i) for i in range(40)], tmp_path).statistics()
    torch.testing.assert_close(std, torch.tensor([0.5], dtype=torch.float64), atol=1e-12, rtol=0)


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
        keys = store_files.text_keys(texts).copy()
        keys[:, 0] %= 3
        return keys

    monkeypatch.setattr(text_store, "text_keys", colliding_keys)
    texts = make_texts(60)
    store = encoder.build([*texts[:50], *texts[:50]], tmp_path)
    assert len(store) == 50
    assert torch.equal(store.lookup(texts[:50]), torch.stack([fake_embedding(text) for text in texts[:50]]))
    assert [text in store for text in texts] == [True] * 50 + [False] * 10


def test_key_set_equals_a_python_set():
    generator = np.random.default_rng(0)
    ours, naive = store_files.KeySet(), set()
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
    other_tensors = store_files.save({"x": torch.zeros(3)})
    other_dim = store_files.save({"embeds": torch.zeros(4, 2), "keys": torch.zeros(4, 2, dtype=torch.int64)})
    no_header = (10**12).to_bytes(8, "little") + whole[8:]
    bad_json = whole[:20] + b"\xff" + whole[21:]
    for data in (whole[:-1], whole + b"0", whole[:30], b"", no_header, bad_json, other_tensors, other_dim):
        shard.write_bytes(data)
        for use in (lambda: TextEmbeddingStore(tmp_path), lambda: encoder.build(texts, tmp_path)):
            with pytest.raises(ValueError, match="shard-00001.safetensors is damaged .* Delete this file"):
                use()
    shard.unlink()
    encoder.embedded.clear()
    store = encoder.build(texts, tmp_path)
    assert encoder.embedded == texts[10:20]
    assert contents(tmp_path) == before
    assert torch.equal(store.lookup(texts), torch.stack([fake_embedding(text) for text in texts]))


@pytest.mark.parametrize("field", ["weights_sha256", "pooling", "max_length", "instruction"])
def test_another_encoder_is_refused(encoder, tmp_path, field):
    encoder.build(["fox"], tmp_path)
    before = contents(tmp_path)
    encoder.fingerprint[field] = "other"
    with pytest.raises(ValueError, match=f"was made with {field} = .* but now {field} = 'other'"):
        encoder.build(["fox", "boat"], tmp_path)
    assert contents(tmp_path) == before


def test_another_dtype_is_refused_but_another_name_of_the_same_model_is_not(encoder, tmp_path):
    encoder.build(["fox"], tmp_path)
    with pytest.raises(ValueError, match="was made with dtype = 'float32' .* but now dtype = 'float16'"):
        encoder.build(["boat"], tmp_path, dtype="float16")
    encoder.fingerprint["model"] = "moved"
    assert len(encoder.build(["boat"], tmp_path)) == 2


def test_what_is_no_store_is_refused_and_left_alone(encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no text store: it has no store.json"):
        TextEmbeddingStore(tmp_path / "nowhere")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is no text store .* holds other files such as 'thesis.tex'"):
        encoder.build(["fox"], tmp_path)
    assert list(contents(tmp_path)) == ["thesis.tex"]
    with pytest.raises(ValueError, match="thesis.tex is a file"):
        encoder.build(["fox"], tmp_path / "thesis.tex")
    encoder.build(["fox"], tmp_path / "store")
    settings = tmp_path / "store" / "store.json"
    good = json.loads(settings.read_text())
    for bad in ("{", "[]", json.dumps({**good, "format": 2}), json.dumps({**good, "dtype": "int4"}), "{}"):
        settings.write_text(bad)
        with pytest.raises(ValueError, match="store.json cannot be read"):
            TextEmbeddingStore(tmp_path / "store")


def test_what_a_killed_writer_left_is_deleted(encoder, tmp_path):
    encoder.build(["fox"], tmp_path)
    before = contents(tmp_path)
    (tmp_path / "shard-00007.safetensors.tmp").write_bytes(b"half a shard")
    assert len(TextEmbeddingStore(tmp_path)) == 1
    encoder.build(["fox"], tmp_path)
    assert contents(tmp_path) == before


def test_no_texts(encoder, tmp_path):
    with pytest.raises(ValueError, match="there are no texts to embed"):
        encoder.build([], tmp_path)
    encoder.build(["fox"], tmp_path)
    assert len(encoder.build([], tmp_path)) == 1


def test_embeddings_that_are_not_finite_are_refused(monkeypatch, tmp_path):
    encoder = FakeEncoder(monkeypatch, lambda text: torch.tensor([1.0, float("nan" if text == "5 bad" else text)]))
    texts = [str(i) for i in range(10)]
    with pytest.raises(ValueError, match="embedding of '5 bad' is not finite"):
        encoder.build([*texts, "5 bad"], tmp_path)
    assert len(TextEmbeddingStore(tmp_path)) == 10, "the shard before it stays"
    with pytest.raises(
        ValueError, match="'70000' is not finite .*7e\\+04 does not fit into torch.float16: store bfloat16"
    ):
        encoder.build(["70000"], tmp_path / "half", dtype="float16")
    assert "70000" in encoder.build(["70000"], tmp_path / "brain", dtype="bfloat16")


def test_a_full_disk_leaves_no_half_shard(encoder, tmp_path):
    texts = make_texts(300)
    encoder.build(texts[:10], tmp_path)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails as it does on a full disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        with pytest.raises(OSError, match="could not write 1.,... bytes .*shard-00001") as error:
            encoder.build(texts, tmp_path, shard_size=300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG
    assert contents(tmp_path) == before
    assert len(encoder.build(texts, tmp_path)) == 300


def test_lookup_reads_only_the_pages_it_needs(monkeypatch, tmp_path):
    rows, dim = 4096, 4096  # 64 MiB
    encoder = FakeEncoder(monkeypatch, lambda text: torch.full((dim,), float(text)))
    encoder.build([str(i) for i in range(rows)], tmp_path, shard_size=rows)
    store = TextEmbeddingStore(tmp_path)
    assert store.lookup(["700"]).unique().tolist() == [700]

    resident, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if "-" in line.split()[0]:
                inside = line.rstrip().endswith(str(tmp_path / "shard-00000.safetensors"))
            elif inside and line.startswith("Rss:"):
                resident += int(line.split()[1])
    # The kernel maps up to 2 MiB around a page that is read.
    assert 0 < resident <= 4096, f"{resident} KiB of 65,536 are in memory"


# --- Processes that are killed, and processes that write at the same time -------------------------------------------------------------

# One process that imports torch once and forks a child for every build. A child gets what to do as Python source.
FORKS = """
import os, shutil, signal, sys, time
from tests.trainers.tiny_encoders import make_texts, tiny_proclip
from trainers.data import TextEmbeddingStore, store_files, text_store

def build(path):
    model, processor = tiny_proclip()
    return TextEmbeddingStore.build(make_texts(50), model, processor, path, shard_size=10, token_budget=200, progress=False)

def start(prepare, path):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            prepare()
            summary = build(path).build_summary
            print(os.path.basename(path), "new", summary.num_new, "stored", summary.num_stored, flush=True)
            code = 0
        finally:
            os._exit(code)
    return pid

def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def die_at(module, name, call, before=True):
    real, calls = getattr(module, name), [0]
    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, name, wrapped)

def nothing():
    pass

import torch
torch.set_num_threads(1)
"""


SCENARIOS = """
path = sys.argv[1]
assert wait(start(nothing, path + "/whole")) == 0

kills = {
    "encoding": lambda: die_at(text_store, "_stored_as", 5),
    "first-write": lambda: die_at(os, "fsync", 1),
    "settings": lambda: die_at(os, "replace", 1, before=False),
    "writing": lambda: die_at(os, "fsync", 5),
    "written": lambda: die_at(os, "replace", 4, before=False),
    "index": lambda: die_at(os, "replace", 7),
}
for name, kill in kills.items():
    assert wait(start(kill, f"{path}/{name}")) == -signal.SIGKILL, name
    shutil.copytree(f"{path}/{name}", f"{path}/{name}-killed")
    assert wait(start(nothing, f"{path}/{name}")) == 0, name

def slow():
    real = text_store.write_shard
    def write(*args):
        real(*args)
        time.sleep(0.1)
    text_store.write_shard = write

first = start(slow, path + "/two-writers")
while not os.path.exists(path + "/two-writers/shard-00000.safetensors"):
    time.sleep(0.01)
second = start(nothing, path + "/two-writers")
assert wait(first) == 0 and wait(second) == 0
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """The finished process, and the folder with the stores that its children left."""
    path = tmp_path_factory.mktemp("stores")
    command = [sys.executable, "-c", FORKS + SCENARIOS, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True), path


def test_a_killed_build_resumes_to_the_same_bytes(forks):
    _, path = forks
    whole = contents(path / "whole")
    shards = [f"shard-0000{i}.safetensors" for i in range(5)]
    assert list(whole) == ["index.safetensors", *shards, "store.json", "store.lock"]
    states = {}
    for killed in sorted(path.glob("*-killed")):
        left = contents(killed)
        finished = sum(name.startswith("shard") and name.endswith("safetensors") for name in left)
        states[killed.name.removesuffix("-killed")] = finished, [name for name in left if name.endswith(".tmp")]
    assert states == {
        "encoding": (1, []),
        "first-write": (0, ["store.json.tmp"]),
        "settings": (0, []),
        "writing": (1, ["shard-00001.safetensors.tmp"]),
        "written": (3, []),
        "index": (5, ["index.safetensors.tmp"]),
    }
    for name in states:
        assert contents(path / name) == whole, name


def test_two_writers_share_the_work(forks):
    run, path = forks
    said = [line for line in run.stdout.splitlines() if line.startswith("two-writers")]
    assert said == ["two-writers new 50 stored 0", "two-writers new 0 stored 50"]
    store = path / "two-writers"
    assert run.stderr.count(f"another process is writing the text store {store}: waiting for it") == 1
    assert contents(store) == contents(path / "whole")


def test_a_store_that_is_being_written_can_be_read(encoder, tmp_path, monkeypatch):
    seen = []

    def write(path, *args):
        store_files.write_shard(path, *args)
        seen.append(len(TextEmbeddingStore(path)))

    monkeypatch.setattr(text_store, "write_shard", write)
    encoder.build(make_texts(30), tmp_path)
    assert seen == [10, 20, 30]


def test_real_batches_are_what_the_store_got(tmp_path):
    """The store's windows do not change what `encode_texts` gives for a text."""
    model, processor = tiny_proclip()
    texts = make_texts(20)
    store = TextEmbeddingStore.build(texts, model, processor, tmp_path, shard_size=6)
    for batch in encode_texts(texts, model, processor):
        torch.testing.assert_close(
            store.lookup([texts[i] for i in batch.indices]), batch.embeddings, atol=1e-5, rtol=1e-5
        )
