"""Text stores that are filled task by task."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from tests.trainers.fake_encoder import contents, fake_embedding
from tests.trainers.tiny_encoders import make_texts
from trainers.data import TextEmbeddingStore
from trainers.data.text_files import divide_texts
from trainers.text_store import claims as store_claims
from trainers.text_store import layout as store_layout
from trainers.text_store import tasks as store_tasks
from trainers.text_store.claims import claimed, running_process
from trainers.text_store.tasks import read_plan
from trainers.text_store.verify import verify_store


TEXTS = make_texts(60)


def check_equal(store, texts):
    """The store has every text once, with its own embedding, and every shard is sound."""
    unique = list(dict.fromkeys(texts))
    assert len(store) == len(unique)
    assert torch.equal(store.lookup(unique), torch.stack([fake_embedding(text) for text in unique]))
    assert verify_store(store.path, progress=False).problems == []


# --- One process -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [1, 7, 100])
def test_tasks_give_the_store_of_one_process(encoder, tmp_path, num_tasks):
    texts = TEXTS[:50] + TEXTS[::-1]  # the same ones in different tasks
    store = encoder.build(texts, tmp_path, num_tasks=num_tasks)
    check_equal(store, texts)
    assert sorted(encoder.embedded) == sorted(set(texts))
    summary = store.build_summary
    assert (summary.num_tasks, summary.num_texts, summary.num_new) == (num_tasks, 110, 60)
    assert summary.num_stored + summary.num_repeated == 50
    before = contents(tmp_path)
    encoder.embedded.clear()
    again = encoder.build(texts, tmp_path, num_tasks=num_tasks)
    assert (again.build_summary.num_tasks, again.build_summary.num_texts, encoder.embedded) == (0, 0, [])
    assert contents(tmp_path) == before
    assert encoder.build(texts, tmp_path).build_summary.num_new == 0, "also for those who do not divide it"


def test_other_texts_are_refused_until_all_tasks_are_done(encoder, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:40]))
    texts, store = divide_texts(tmp_path / "a.txt"), tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(store_layout.Writer, "write_temporary", fail_at(3))
        with pytest.raises(OSError, match="the disk is gone"):
            encoder.build(texts, store, num_tasks=4)
    with open(tmp_path / "a.txt", "a") as file:
        file.write("\none more")
    for change, message in (
        ({}, r"texts.bytes.a.txt is \d+ there and \d+ here; 3 of its 4 tasks are left: finish it by the command"),
        ({"num_tasks": 5}, "num_tasks is 4 there and 5 here"),
        ({"dtype": "float16"}, "dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.build(divide_texts(tmp_path / "a.txt"), store, **{"num_tasks": 4, **change})
    encoder.fingerprint["pooling"] = "last"
    with pytest.raises(ValueError, match="made by another encoder: pooling is 'mean' there and 'last' here"):
        encoder.build(texts, store, num_tasks=4)
    encoder.fingerprint["pooling"] = "mean"
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:40]))
    encoder.embedded.clear()
    assert encoder.build(divide_texts(tmp_path / "a.txt"), store, num_tasks=4).build_summary.num_tasks == 3
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:50]))
    grown = encoder.build(divide_texts(tmp_path / "a.txt"), store, num_tasks=5)
    assert (grown.build_summary.num_tasks, grown.build_summary.num_new) == (5, 10)
    check_equal(grown, TEXTS[:50])


def fail_at(call):
    """`Writer.write_temporary` whose disk goes away."""
    real, calls = store_layout.Writer.write_temporary, []

    def write(*args):
        calls.append(args)
        if len(calls) >= call:
            raise OSError("the disk is gone")
        return real(*args)

    return write


@pytest.mark.parametrize("built_before", [False, True])
def test_a_damaged_shard_comes_back(encoder, tmp_path, built_before):
    texts = TEXTS[:40]
    if built_before:
        encoder.build(texts[:10], tmp_path)
    encoder.build(texts, tmp_path, num_tasks=4)
    shards = sorted(tmp_path.glob("shard-*"))
    assert len(shards) == 4
    held = len(TextEmbeddingStore(tmp_path))
    for shard in shards:
        shard.unlink()
        check_equal(encoder.build(texts, tmp_path, num_tasks=4), texts)
    assert held == 40


def test_a_text_that_two_tasks_embed_at_the_same_time_is_stored_once(encoder, tmp_path, monkeypatch):
    """While task 1 embeds, another process embeds and writes the same texts as task 2."""

    class NothingLeft(Exception):
        pass

    def no_more(seconds):
        raise NothingLeft

    texts, real = TEXTS[:10], store_layout.Writer.write_temporary

    def write(writer, *args):
        if writer.name == "task-1-of-2":
            with pytest.raises(NothingLeft):  # task 1 is not its own
                encoder.build([*texts, *texts], tmp_path, num_tasks=2)
        return real(writer, *args)

    monkeypatch.setattr(store_layout.Writer, "write_temporary", write)
    monkeypatch.setattr(store_tasks.time, "sleep", no_more)
    store = encoder.build([*texts, *texts], tmp_path, num_tasks=2)
    assert encoder.embedded == texts + texts
    check_equal(store, texts)
    assert (store.build_summary.num_new, store.build_summary.num_repeated) == (0, 10)
    assert read_plan(tmp_path).summary().num_new == 10
    assert [file.name for file in tmp_path.glob("shard-*")] == ["shard-00002-00000.safetensors"]


# --- Claims ----------------------------------------------------------------------------------------------------------------------------


def test_a_task_is_claimed_once(tmp_path, encoder):
    encoder.build(["fox"], tmp_path, num_tasks=1)
    with claimed(tmp_path, "task-1-of-1") as first, claimed(tmp_path, "task-1-of-1") as second:
        assert first and not second
        assert running_process(tmp_path, "task-1-of-1")["pid"] == os.getpid()
    assert running_process(tmp_path, "task-1-of-1") is None


def test_other_divisions_are_refused_while_somebody_is_at_work(tmp_path, encoder):
    encoder.build(TEXTS[:10], tmp_path)
    with store_layout.store_lock(tmp_path, "task-3-of-8"):
        for options in ({"num_tasks": 4}, {"num_processes": 8}, {}):
            with pytest.raises(ValueError, match="is being filled by task-3-of-8, but this process is"):
                encoder.build(TEXTS[:10], tmp_path, **options)
    with pytest.raises(ValueError, match="num_tasks takes the place of process_index and num_processes"):
        encoder.build(TEXTS[:10], tmp_path, num_tasks=2, num_processes=2)
    with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
        encoder.build(TEXTS[:10], tmp_path, num_tasks=0)


@pytest.mark.parametrize("alive", [False, True])
def test_the_task_of_another_machine_is_taken_over_when_it_is_dead(tmp_path, encoder, monkeypatch, caplog, alive):
    """If the other process lives on although its lock was to be had, locks do not hold between the machines."""
    monkeypatch.setattr(store_claims, "_BEAT", 0.2)
    encoder.build(["fox"], tmp_path, num_tasks=1)
    left = tmp_path / "tasks" / "task-1-of-1.running"
    left.write_text(json.dumps({"machine": "another", "host": "node7", "pid": 77}))
    stop = threading.Event()

    def beat():
        while not stop.wait(0.1):
            os.utime(left)

    if alive:
        threading.Thread(target=beat, daemon=True).start()
        with pytest.raises(
            OSError, match="process 77 of node7 is at work on task-1-of-1 .* do not hold between machines"
        ):
            with claimed(tmp_path, "task-1-of-1"):
                pass
        stop.set()
        assert left.exists()
    else:
        with claimed(tmp_path, "task-1-of-1") as mine:
            assert mine
        assert "process 77 of node7 has left a task unfinished" in caplog.text


# --- Several processes -----------------------------------------------------------------------------------------------------------------

# One process that imports torch once and forks three of different speed, one of which kills itself while it embeds its third shard.
PROCESSES = """
import json, os, signal, sys, time
import pytest
from tests.trainers.fake_encoder import FakeEncoder, fake_embedding
from trainers.data.text_files import divide_texts

path = sys.argv[1]
texts = divide_texts(path + "/a.txt")

def start(name, seconds, last=None):
    pid = os.fork()
    if pid:
        return pid
    log = os.open(f"{path}/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    count = 0
    def embed(text):
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        os.write(log, (text + "\\n").encode())
        return fake_embedding(text)
    store = FakeEncoder(pytest.MonkeyPatch(), embed).build(texts, path + "/store", num_tasks=20)
    os.write(log, (json.dumps([store.build_summary.num_tasks, store.build_summary.num_new]) + "\\n").encode())
    os._exit(0)

def wait(pids):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

codes = wait([start("slow", 0.03), start("killed", 0.005, last=25), start("fast", 0)])
assert codes == [0, -signal.SIGKILL, 0], codes
assert wait([start("again", 0)]) == [0]
"""


def test_three_processes_of_different_speed_one_killed(encoder, tmp_path):
    """20 tasks: nothing is lost, every text is stored once, and only the shard that died with its process is embedded a second time."""
    texts = make_texts(400)
    (tmp_path / "a.txt").write_text("\n".join(texts))
    subprocess.run([sys.executable, "-c", PROCESSES, str(tmp_path)], timeout=120, check=True)
    logs = {name: (tmp_path / f"{name}.log").read_text().splitlines() for name in ("slow", "killed", "fast", "again")}
    assert logs["again"] == ["[0, 0]"], "the same command again does nothing"
    done = {name: json.loads(logs[name].pop()) for name in ("slow", "fast")}
    embedded = [text for name in ("slow", "killed", "fast") for text in logs[name]]
    assert len(logs["killed"]) == 24 and set(embedded) == set(texts)
    twice = len(embedded) - len(texts)
    assert twice <= 10 and set(logs["killed"]).issuperset(text for text in texts if embedded.count(text) > 1)
    tasks_of_killed = 20 - done["slow"][0] - done["fast"][0]
    assert 0 <= tasks_of_killed <= 2 and 0 < done["slow"][0] < done["fast"][0]
    store, whole = TextEmbeddingStore(tmp_path / "store"), encoder.build(texts, tmp_path / "whole")
    check_equal(store, texts)
    assert torch.equal(store.lookup(texts), whole.lookup(texts))
    keys = [np.sort(np.concatenate([shard.read_keys() for shard in some.shards]), axis=0) for some in (store, whole)]
    assert np.array_equal(*keys)
    assert not list((tmp_path / "store").rglob("*.tmp")) and not list((tmp_path / "store").rglob("*.running"))
    assert read_plan(tmp_path / "store").summary().num_new <= 400
