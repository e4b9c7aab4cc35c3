"""The text part of benchmarks/gpu.py, at tiny sizes."""

import importlib.util
from pathlib import Path

import pytest


PROGRAM = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_all_ways_embed_the_same_texts(capsys):
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PROGRAM)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows = {row["name"]: row for row in benchmark.measure_texts("tiny", ["captions"], 0.004, rate=1e9)}
    ways = ["plain loop", "sentence-transformers", "padded", "packed"]
    assert list(rows) == [f"captions: {way}" for way in ways]
    assert rows["captions: packed"]["smallest_cosine_to_padded"] > 0.99999
    assert rows["captions: plain loop"]["ratio"] == 1 and all(row["ours"] > 0 for row in rows.values())


def test_flops_by_hand():
    """Of Llama's seven matrices a layer, and of queries times keys and weights times values."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PROGRAM)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    sizes = benchmark.LLMS["tiny"]
    width, inner, heads, key_heads = (
        sizes[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    matrices = width * width * 2 + 2 * width * (width // heads) * key_heads + 3 * width * inner
    expected = sum(2 * (2 * matrices * n + 2 * 2 * width * n * n) for n in (3, 5))
    norms = 2 * 8 * 5 * width  # five of them, which the benchmark counts with the matrices
    assert benchmark.flops_of(benchmark.make_model("tiny"), [3, 5]) == pytest.approx(expected + norms)
