"""What the tests of publishing share: a checkpoint, and a stand-in Hub that is this process's."""

import shutil
from pathlib import Path

import pytest

from tests.hub_server import HubServer, hub_server
from tests.modeling_proclip import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A full checkpoint, its processor, and what lies around in such folders."""
    folder = tmp_path_factory.mktemp("checkpoint") / "my-proclip"
    tiny.model().save_pretrained(folder)
    tiny.processor(prompt_template=tiny.LLAMA3, max_length=40).save_pretrained(folder)
    for name in ("optimizer.pt", "training_args.bin", ".env", "store.lock", "modeling_other.py", "runs/events.1"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("HF_TOKEN=hf_" + "x" * 34)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "my-proclip")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> HubServer:
    with hub_server(tmp_path / "blobs") as server:
        server.patch(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
