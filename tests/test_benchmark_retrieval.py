"""The retrieval benchmark: its table, what it asks of the peer, and its help where the peer is missing."""

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from trainers.evaluation import retrieval_recall


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "retrieval.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_retrieval", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_help_and_full_size_need_no_peer(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)  # as if it were not installed

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["retrieval.py", *arguments])
        benchmark.main()

    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0 and "--num-images" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="pip install --no-deps clip-benchmark, or give --no-peer"):
        run("--num-images", "200")
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", SameProcess)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    run("--num-images", "200", "--no-peer", "--threads", "1", "--json", str(tmp_path / "r.json"))
    table = json.loads((tmp_path / "r.json").read_text())
    assert table["full_size"]["num_texts"] == 1000 and table["rows"] == []
    assert set(table["full_size"]["recalls"]) == {f"{way}_r@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    assert table["full_size"]["peak_bytes"] > 1e8 and table["full_size"]["seconds"] > 0


class SameProcess(ThreadPoolExecutor):
    """In place of a fresh process, whose import of torch would take most of the test's time."""

    def __init__(self, max_workers: int, mp_context=None):
        super().__init__(max_workers)


def test_embeddings_are_unit_length_and_stronger_ones_are_found(benchmark):
    images, texts, text_to_image = benchmark.make_embeddings(50, strength=3.0)
    assert texts.shape == (250, 512) and text_to_image[:6].tolist() == [0, 0, 0, 0, 0, 1]
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(250))
    assert retrieval_recall(images, texts, text_to_image)["t2i_r@1"] == 1.0


def test_the_peers_size_keeps_to_both_limits(benchmark):
    by_time = benchmark.largest_peer_size(2.0, batch_size=64, gigabytes=100, seconds=50)
    assert by_time == 4500  # 2 s x 5² is not below 50 s
    by_memory = benchmark.largest_peer_size(1e-9, batch_size=64, gigabytes=8, seconds=50)
    assert benchmark.peer_bytes(by_memory, 64) < 8e9 <= benchmark.peer_bytes(by_memory + 500, 64)


def test_the_peer_has_the_same_recalls(benchmark):
    pytest.importorskip("clip_benchmark")
    images, texts, text_to_image = benchmark.make_embeddings(60, strength=0.1)
    _, found = benchmark.run_peer(images, texts, batch_size=16)
    expected = retrieval_recall(images, texts, text_to_image)
    assert found == pytest.approx(expected, abs=1e-6) and 0 < expected["t2i_r@1"] < 1
