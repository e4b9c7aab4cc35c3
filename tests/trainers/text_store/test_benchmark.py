"""The steps of benchmarks/text_store.py, on a store of 25,000 rows."""

import importlib.util
import json
from pathlib import Path

import torch

from trainers.data import TextEmbeddingStore


PROGRAM = Path(__file__).parents[3] / "benchmarks" / "text_store.py"


def test_built_killed_resumed_verified_and_looked_up(tmp_path):
    spec = importlib.util.spec_from_file_location("text_store_benchmark", PROGRAM)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    num_texts, dim = 5 * benchmark.SHARD_SIZE + 100, 8
    built = benchmark.build_killed_and_resumed(tmp_path / "ours", num_texts, dim)
    assert 2 <= built["left"] < 6 and built["embedded"] == num_texts - built["left"] * benchmark.SHARD_SIZE
    verified = benchmark.verify(tmp_path / "ours")
    assert (verified["problems"], verified["num_texts"]) == ([], num_texts)
    store, numbers = TextEmbeddingStore(tmp_path / "ours"), torch.randint(num_texts, (3000,)).tolist()
    found = store.lookup([benchmark.text_of(number) for number in numbers])
    assert torch.equal(found, benchmark.Embeddings(num_texts, dim).of(numbers))

    benchmark.write_keys(tmp_path / "keys", 70_000)
    indexed = benchmark.index_keys(tmp_path / "keys")
    assert indexed["texts"] == 70_000 and json.dumps(indexed)
