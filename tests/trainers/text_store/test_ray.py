"""Text stores that the workers of a Ray cluster fill."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from trainers.display.progress import Progress
from trainers.text_store import ray_workers


PROGRAM = Path(__file__).parents[3] / "benchmarks" / "corpora.py"


def test_a_worker_and_the_driver_are_killed(tmp_path):
    """The program itself compares keys and embeddings with those of one process, and verifies the store."""
    command = [sys.executable, PROGRAM, "--num-texts", "20000", "--seconds-per-text", "0.0002"]
    command += ["--json", tmp_path / "results.json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    alone, ray = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert alone["rows_stored"] == ray["rows_stored"] == 20_000 < ray["rows_read"] == alone["rows_read"]
    assert 10 <= ray["done_when_a_worker_was_killed"] <= ray["done_when_the_driver_was_killed"] < 40


def wait_for(monkeypatch, path, *endings):
    """Waits for workers whose runs end one after the other: by an error, or None."""

    def get(ending):
        if ending is not None:
            raise ending

    fake = SimpleNamespace(get=get, wait=lambda runs, timeout: (runs[:1], runs[1:]))
    monkeypatch.setattr(ray_workers, "ray", fake)
    ray_workers._wait(list(endings), path, Progress("", None, "tasks", shown=False))


def test_what_a_worker_refuses_is_raised_as_it_is(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="^a.jsonl, line 2 is no JSON$"):
        wait_for(monkeypatch, tmp_path, RayTaskError("build", "a traceback", ValueError("a.jsonl, line 2 is no JSON")))


def test_workers_that_die_for_good(monkeypatch, tmp_path, caplog):
    wait_for(monkeypatch, tmp_path, ActorDiedError(), None)
    assert "a worker has died 6 times and is not started again" in caplog.text
    with pytest.raises(ChildProcessError, match="every worker has died 6 times.* the same command continues"):
        wait_for(monkeypatch, tmp_path, ActorDiedError(), ActorDiedError())


def test_no_workers_are_refused_before_anything_is_started(tmp_path):
    with pytest.raises(ValueError, match="num_workers must be at least 1, got 0"):
        ray_workers.build_with_ray([], None, tmp_path / "store", num_workers=0)
    assert not (tmp_path / "store").exists()


def test_no_cluster_at_the_address(tmp_path):
    """In a process of its own, because Ray reads these limits once. Ray's own 20 attempts would take 14 minutes."""
    code = f"""
from trainers.text_store.ray_workers import build_with_ray
try:
    build_with_ray([], None, {str(tmp_path / "store")!r})
except ConnectionError as error:
    print(error)
"""
    limits = {"RAY_py_gcs_connect_timeout_s": "1", "RAY_gcs_rpc_server_connect_timeout_s": "1"}
    environment = {**os.environ, **limits, "RAY_ADDRESS": "127.0.0.1:1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("no Ray cluster answers at 127.0.0.1:1, which RAY_ADDRESS names"), result.stderr
    assert result.stderr.count("Failed to get cluster ID") == 1
