"""Text stores that the workers of a Ray cluster fill."""

import json
import subprocess
import sys
from pathlib import Path


PROGRAM = Path(__file__).parents[3] / "benchmarks" / "corpora.py"


def test_a_worker_and_the_driver_are_killed(tmp_path):
    """The program itself compares keys and embeddings with those of one process, and verifies the store."""
    command = [sys.executable, PROGRAM, "--num-texts", "20000", "--json", tmp_path / "results.json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    alone, ray = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert alone["rows_stored"] == ray["rows_stored"] == 20_000 < ray["rows_read"] == alone["rows_read"]
    assert 10 <= ray["done_when_a_worker_was_killed"] <= ray["done_when_the_driver_was_killed"] < 40
