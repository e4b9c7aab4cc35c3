"""Runs of `proclip index` that are killed, or that meet another one."""

import subprocess
import sys

import pytest
import torch

from tests.trainers.search.conftest import contents
from trainers.search.table import ImageIndex


@pytest.fixture
def index_in_processes(photos, tmp_path):
    """Runs tests/trainers/search/indexing_processes.py and returns its lines."""

    def run(mode: str) -> list[str]:
        command = [sys.executable, "-m", "tests.trainers.search.indexing_processes", mode, str(photos), str(tmp_path)]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600).stdout.splitlines()

    return run


def test_killed_at_ten_random_moments(index_in_processes, photos, tmp_path):
    (photos / "page.jpg").write_text("<html>")
    lines = index_in_processes("killed")
    assert lines.count("repeated 0") == 10 and "killed -9" in lines
    whole = ImageIndex(tmp_path / "whole.index")
    expected = contents(whole)
    assert len(expected) == 10
    for number in range(10):
        index = ImageIndex(tmp_path / f"{number}.index")
        rows = contents(index)
        mine, theirs = (torch.tensor([row.pop("embedding") for row in some]) for some in (rows, contents(whole)))
        torch.testing.assert_close(mine, theirs)  # batches of another size round otherwise
        assert rows == [{name: value for name, value in row.items() if name != "embedding"} for row in expected]
        assert index.signatures(index.unreadable) == whole.signatures(whole.unreadable) != {}
        assert [config.name for config in index.images.list_indices()] == ["words_idx"]


def test_two_at_once(index_in_processes, tmp_path):
    lines = index_in_processes("together")
    assert lines[1:] == ["second 1", "first 0"]
    assert "photos.index is being written by another process: wait until it has finished" in lines[0]
    assert len(ImageIndex(tmp_path / "photos.index")) == 10
