"""benchmarks/gpu.py at tiny sizes."""

import importlib.util
from pathlib import Path

import pytest


PROGRAM = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_ways_embed_the_same_texts(benchmark):
    rows = {row["name"]: row for row in benchmark.measure_texts("tiny", ["captions"], 0.004, rate=1e9)}
    ways = ["plain loop", "sentence-transformers", "padded", "packed"]
    assert list(rows) == [f"captions: {way}" for way in ways]
    assert rows["captions: packed"]["smallest_cosine_to_padded"] > 0.99999
    assert rows["captions: plain loop"]["ratio"] == 1 and all(row["ours"] > 0 for row in rows.values())


def test_training_is_compared_with_a_plain_loop(benchmark):
    rows = {row["name"]: row for row in benchmark.measure_training("tiny", 2, 4, quick=True, rate=1e9)}
    assert list(rows) == ["stage 2: LLM2CLIP", "stage 2: ProCLIP", "stage 2: ProCLIP, cached"]
    for row, passes in zip(rows.values(), (3, 4, 5), strict=True):
        flops = benchmark.image_flops(benchmark.training_model("tiny"))
        assert row["share_of_matmul_rate"] == pytest.approx(passes * flops * row["ours"] / 1e9)
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"]) and 0 <= row["data_wait"] <= 1


def test_flops_of_an_image_by_hand(benchmark):
    """Of attention's four and the MLP's two matrices a layer, for 2 x 2 patches and the class token."""
    width, inner, layers, tokens = 32, 64, 2, 5
    matrices = layers * (4 * width * width + 2 * width * inner)
    vectors = layers * (4 * width + inner + width + 4 * width) + 4 * width  # biases and norms, counted with them
    expected = 2 * (matrices + vectors) * tokens + layers * 2 * 2 * width * tokens * tokens
    assert benchmark.image_flops(benchmark.training_model("tiny")) == expected


def test_flops_by_hand(benchmark):
    """Of Llama's seven matrices a layer, and of queries times keys and weights times values."""
    sizes = benchmark.LLMS["tiny"]
    width, inner, heads, key_heads = (
        sizes[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    matrices = width * width * 2 + 2 * width * (width // heads) * key_heads + 3 * width * inner
    expected = sum(2 * (2 * matrices * n + 2 * 2 * width * n * n) for n in (3, 5))
    norms = 2 * 8 * 5 * width  # five of them, which the benchmark counts with the matrices
    assert benchmark.flops_of(benchmark.make_model("tiny"), [3, 5]) == pytest.approx(expected + norms)
