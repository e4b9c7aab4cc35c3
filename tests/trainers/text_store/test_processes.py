"""Text stores that several processes write, and processes that are killed."""

import subprocess
import sys
import threading

import pytest
import torch

from tests.trainers.fake_encoder import contents
from tests.trainers.tiny_encoders import make_texts
from trainers.data import TextEmbeddingStore
from trainers.text_store import layout as store_layout
from trainers.text_store.verify import verify_store


# --- Processes that are killed, and processes that write at the same time -------------------------------------------------------------

# One process that imports torch once and forks a child for every build. A child gets what to do as Python source.
FORKS = """
import os, shutil, signal, sys, time
from tests.trainers.tiny_encoders import make_texts, tiny_proclip
from trainers.data import TextEmbeddingStore
from trainers.text_store import build as store_build, layout as store_layout

def build(path, index=0, count=1):
    model, processor = tiny_proclip()
    return TextEmbeddingStore.build(
        make_texts(50) + make_texts(50)[::-1], model, processor, path, shard_size=10, token_budget=200, progress=False,
        process_index=index, num_processes=count,
    )

def start(prepare, path, index=0, count=1):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            prepare()
            store = build(path, index, count)
            summary = store.build_summary
            said = (os.path.basename(path), index, "new", summary.num_new, "stored", summary.num_stored, len(store))
            os.write(1, (" ".join(map(str, said)) + "\\n").encode())  # in one piece
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
    "encoding": lambda: die_at(store_build, "stored_as", 5),
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
    real = store_layout.Writer.write_shard
    def write(*args):
        real(*args)
        time.sleep(0.3)
    store_layout.Writer.write_shard = write

first = start(slow, path + "/two-writers")
while not os.path.exists(path + "/two-writers/shard-00000.safetensors"):
    time.sleep(0.01)
second = start(nothing, path + "/two-writers")
assert wait(first) == 0 and wait(second) == 0

# Three share the texts. One dies while it writes its second shard, one before its first, and all of them are started again.
def three(name, prepare):
    return [start(prepare.get(index, nothing), path + "/" + name, index, 3) for index in range(3)]

assert [wait(pid) for pid in three("shared", {})] == [0, 0, 0]
deaths = {0: lambda: die_at(os, "fsync", 5), 2: lambda: die_at(store_build, "stored_as", 1)}
assert [wait(pid) for pid in three("shared-killed", deaths)] == [-signal.SIGKILL, 0, -signal.SIGKILL]
shutil.copytree(path + "/shared-killed", path + "/shared-resumed-by-one")
assert [wait(pid) for pid in three("shared-killed", {})] == [0, 0, 0]
assert wait(start(nothing, path + "/shared-resumed-by-one")) == 0
"""


KILLED = ("encoding", "first-write", "settings", "writing", "written", "index")


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
    assert list(whole) == ["index.safetensors", *shards, "store.json"]
    states = {}
    for killed in (path / f"{name}-killed" for name in KILLED):
        left = contents(killed)
        finished = sum(name.startswith("shard") and name.endswith("safetensors") for name in left)
        states[killed.name.removesuffix("-killed")] = finished, [name for name in left if name.endswith(".tmp")]
    assert states == {
        "encoding": (1, []),
        "first-write": (0, ["store.json.tmp"]),
        "settings": (0, []),
        "writing": (1, ["writer-0-of-1.tmp"]),
        "written": (3, []),
        "index": (5, ["index.safetensors.tmp"]),
    }
    for name in states:
        assert contents(path / name) == whole, name


def test_two_writers_share_the_work(forks):
    run, path = forks
    said = sorted(line for line in run.stdout.splitlines() if line.startswith("two-writers"))
    assert said == ["two-writers 0 new 0 stored 100 50", "two-writers 0 new 50 stored 0 50"]
    store = path / "two-writers"
    assert run.stderr.count(f"another process is writing the text store {store} as writer-0-of-1: waiting for it") == 1
    assert contents(store) == contents(path / "whole")


def test_a_store_that_is_being_written_can_be_read(encoder, tmp_path, monkeypatch):
    seen = []

    real = store_layout.Writer.write_shard

    def write(writer, *args):
        real(writer, *args)
        store = TextEmbeddingStore(writer.path)
        seen.append(len(store))
        assert store.lookup(make_texts(30)[: len(store)]).shape == (len(store), 6)

    monkeypatch.setattr(store_layout.Writer, "write_shard", write)
    encoder.build(make_texts(30), tmp_path)
    assert seen == [10, 20, 30]


@pytest.mark.parametrize("name", ["shared", "shared-killed", "shared-resumed-by-one"])
def test_several_processes_fill_one_store(forks, name):
    """No text is embedded twice, and what can be looked up is what one process would have stored."""
    run, path = forks
    store, whole = TextEmbeddingStore(path / name), TextEmbeddingStore(path / "whole")
    assert len(store) == 50
    texts = make_texts(50)
    torch.testing.assert_close(store.lookup(texts), whole.lookup(texts), atol=1e-5, rtol=1e-5)  # batches are others
    assert not list((path / name).glob("*.tmp"))
    found = verify_store(path / name, progress=False)
    assert (found.problems, found.num_texts) == ([], 50)
    if name == "shared":
        said = sorted(line.split() for line in run.stdout.splitlines() if line.startswith("shared "))
        assert [line[1] for line in said] == ["0", "1", "2"]
        new = [int(line[3]) for line in said]
        assert sum(new) == 50 and min(new) > 5, "shared by hash"
        assert max(int(line[6]) for line in said) == 50, "who is done last has them all"


def test_processes_that_divide_otherwise_are_refused(encoder, tmp_path):
    encoder.build(make_texts(10), tmp_path)
    with store_layout.writer(tmp_path, 1, 4):
        with pytest.raises(ValueError, match="being filled by writer-1-of-4, but this process is writer-0-of-1"):
            encoder.build(make_texts(10), tmp_path)
    assert encoder.build(make_texts(10), tmp_path, process_index=0, num_processes=4).build_summary.num_new == 0
    assert encoder.build(make_texts(10), tmp_path).build_summary.num_stored == 10


def test_a_process_without_texts_has_nothing_to_do(encoder, tmp_path):
    stores = [encoder.build(["fox"], tmp_path, process_index=index, num_processes=5) for index in range(5)]
    assert sorted(store.build_summary.num_new for store in stores) == [0, 0, 0, 0, 1]
    assert len(TextEmbeddingStore(tmp_path)) == 1
    with pytest.raises(ValueError, match="process_index must be at least 0 and less than num_processes, got 2 of 2"):
        encoder.build(["fox"], tmp_path, process_index=2, num_processes=2)


def test_who_is_done_waits_for_the_others(encoder, tmp_path):
    encoder.build(make_texts(10), tmp_path)
    waiting = threading.Thread(target=encoder.build, args=(make_texts(10), tmp_path), kwargs={"num_processes": 4})
    with store_layout.writer(tmp_path, 1, 4):
        waiting.start()
        waiting.join(timeout=0.5)
        assert waiting.is_alive()
    waiting.join(timeout=60)
    assert not waiting.is_alive()
