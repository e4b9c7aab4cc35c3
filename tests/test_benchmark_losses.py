"""benchmarks/losses.py at tiny sizes."""

import importlib.util

import pytest
import torch

from tests.environments import REPOSITORY


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("losses_benchmark", REPOSITORY / "benchmarks" / "losses.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiling takes seconds, and is PyTorch's business."""
    monkeypatch.setattr(torch, "compile", lambda function: function)


def test_all_ways_are_the_same_loss(benchmark, uncompiled):
    results: dict[str, list] = {}
    for name, _, dtype, loss_fn in benchmark.ways():
        results.setdefault(name, []).append(benchmark.step(loss_fn, benchmark.make_inputs(700, 16, dtype)))
    assert list(results) == ["InfoNCE", "sigmoid"]
    for ours, *others in results.values():
        assert len(others) == 2
        for other in others:
            torch.testing.assert_close(other, ours, rtol=1e-5, atol=1e-8)


def test_blocks_take_less_memory_than_the_whole_matrix(benchmark, uncompiled):
    rows = {row["name"]: row for row in benchmark.measure(2048, 16, rounds=1)}
    assert len(rows) == 2 * 2 * 2
    for name in ("InfoNCE", "sigmoid"):
        row = rows[f"2048 pairs, {name}, memory against whole"]
        assert row["ratio"] > 2 and row["peer"] > 2048**2 * 4 / 1e6, "less than the matrix itself"
