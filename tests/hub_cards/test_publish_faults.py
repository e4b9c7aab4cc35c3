"""`publish` and downloads when something fails on the way: errors, retries, interruptions and the next run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoModel

from hub_cards.publish import publish
from hub_cards.staging import PublishError
from modeling_proclip.conversion.output import scratch_folder
from tests.environments import REPOSITORY
from tests.hub_cards.publishing import run
from tests.hub_server import READ_TOKEN, TOKEN


@pytest.mark.parametrize(
    "token, repo_id, message",
    [
        ("hf_" + "W" * 34, "alice/x", r"does not know your token.*hf auth login"),
        (None, "alice/x", r"does not know your token, or there is none \(401\)"),
        (TOKEN, "bob/x", r"may not write to bob/x \(403: You don't have the rights"),
        (READ_TOKEN, "alice/x", r"may not write to alice/x \(403: Your token may only read"),
    ],
)
def test_who_may_not_write_is_told_what_to_do(checkpoint, hub, tmp_path, monkeypatch, token, repo_id, message):
    hub.patch(monkeypatch, tmp_path / "other", token)
    with pytest.raises(PublishError, match=message) as caught:
        publish(checkpoint, repo_id)
    result = run(checkpoint, repo_id)
    *plan, error = result.stderr.splitlines()
    assert result.exit_code == 1 and error.startswith("error: ") and len(plan) <= 1
    assert "hf_W" not in str(caught.value) + result.output and READ_TOKEN not in str(caught.value) + result.output
    assert hub.repositories == {}


@pytest.mark.parametrize(
    "status, message",
    [
        (409, r"Somebody else changed alice/x meanwhile \(409"),
        (412, r"Somebody else changed alice/x meanwhile \(412"),
        (429, r"asks for fewer requests \(429.*same command again"),
        (500, r"The Hub failed \(500.*same command again"),
        (503, r"The Hub failed \(503.*not sent twice"),
        (418, r"The Hub refuses alice/x \(418: said the stand-in\)"),
    ],
)
def test_a_commit_that_fails_leaves_nothing_and_the_next_run_sends_no_weights(checkpoint, hub, status, message):
    fault = hub.fail("POST", "/commit/", status)
    fault.message = f"said the stand-in, token {TOKEN}" if status == 500 else fault.message
    with pytest.raises(PublishError, match=message) as caught:
        publish(checkpoint, "alice/x")
    assert TOKEN not in str(caught.value)
    assert list(hub.files("alice/x")) == [".gitattributes"]  # no half repository
    sent = hub.bytes_received("^/lfs/")
    report = publish(checkpoint, "alice/x")
    assert hub.bytes_received("^/lfs/") == sent == report.files["model.safetensors"]
    assert "README.md" in hub.files("alice/x")


def test_somebody_else_s_commit_is_not_overwritten(checkpoint, hub, monkeypatch):
    publish(checkpoint, "alice/x")
    model_info = HfApi.model_info

    def and_then_somebody_commits(self, *args, **kwargs):
        info = model_info(self, *args, **kwargs)
        repository = hub.repositories["model", "alice/x"]
        repository.commit("main", "somebody else's", {**repository.find("main").files, "news.txt": hub.store(b"news")})
        return info

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", and_then_somebody_commits)
    with pytest.raises(PublishError, match="Somebody else changed alice/x meanwhile"):
        publish(checkpoint, "alice/x", max_shard_size="60KB")
    assert "news.txt" in hub.files("alice/x") and "model.safetensors" in hub.files("alice/x")


def test_a_dropped_upload_is_tried_again_by_itself(checkpoint, hub, no_waiting):
    hub.drop("PUT", "^/lfs/", after=100_000)
    hub.fail("PUT", "^/lfs/", 503)
    report = publish(checkpoint, "alice/x")
    size = report.files["model.safetensors"]
    assert hub.bytes_received("^/lfs/") == 100_000 + 2 * size  # cut, refused when it was whole, taken
    assert hub.files("alice/x")["model.safetensors"].size == size


def test_a_line_that_stays_down_ends_in_one_error_and_other_files_are_not_sent_again(checkpoint, hub, no_waiting):
    publish(checkpoint, "alice/shards", max_shard_size="60KB")
    shards = [blob for name, blob in hub.files("alice/shards").items() if name.endswith(".safetensors")]
    for blob in shards:
        hub.blob_path(blob.sha256).unlink()
    hub.drop("PUT", f"^/lfs/{shards[0].sha256}", after=1_000, times=6)  # the client tries a file six times
    hub.requests.clear()
    with pytest.raises(PublishError, match="cannot be reached or hung up.*not sent twice"):
        publish(checkpoint, "alice/x", max_shard_size="60KB")
    assert hub.bytes_received("^/lfs/") == 6 * 1_000 + sum(blob.size for blob in shards[1:])
    hub.requests.clear()
    publish(checkpoint, "alice/x", max_shard_size="60KB")
    assert hub.bytes_received("^/lfs/") == shards[0].size


def test_parts_of_a_large_file(checkpoint, hub, no_waiting):
    hub.part_size = 50_000
    hub.fail("PUT", r"/lfs/\w+/2", 502)
    hub.drop("PUT", r"/lfs/\w+/4", after=7_000)
    report = publish(checkpoint, "alice/x")
    size = report.files["model.safetensors"]
    assert hub.bytes_received(r"^/lfs/\w+/") == size + 50_000 + 7_000 + hub.bytes_received("^/lfs/complete")
    assert hub.read("alice/x", "model.safetensors") == (checkpoint / "model.safetensors").read_bytes()


def test_a_download_that_is_cut_goes_on_where_it_was(checkpoint, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)  # what the client keeps; 10 MB else
    report = publish(checkpoint, "alice/x")
    hub.drop("GET", "/model.safetensors", after=100_000)
    hub.fail("GET", "/tokenizer.json", 429, Retry_After="0")
    folder = Path(snapshot_download("alice/x", revision=report.commit))
    assert hub.bytes_sent("/model.safetensors") == report.files["model.safetensors"]  # not a byte twice
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert torch.equal(
        AutoModel.from_pretrained(folder).logit_scale, AutoModel.from_pretrained(checkpoint).logit_scale
    )
    hub.patch(monkeypatch, tmp_path / "stranger", token=None)
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("alice/x", local_dir=tmp_path / "seen")  # it is private


def test_nobody_there(checkpoint, hub, monkeypatch, no_waiting):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PublishError, match="The Hub at http://127.0.0.1:9 cannot be reached"):
        publish(checkpoint, "alice/x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE is set, so nothing can be sent"):
        publish(checkpoint, "alice/x")


def test_full_disk(checkpoint, hub, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hub_cards.staging.write_tensors", full)
    with pytest.raises(PublishError, match="has no space left for the weights"):
        publish(checkpoint, "alice/x", max_shard_size="60KB")
    assert not list(checkpoint.parent.glob(".*publish*")) and hub.repositories == {}


def test_two_runs_at_once_do_not_disturb_each_other(checkpoint, hub):
    with scratch_folder(checkpoint.parent, f".{checkpoint.name}.publish-") as theirs:
        (theirs / "model.safetensors").write_text("being sent")
        publish(checkpoint, "alice/x", max_shard_size="60KB")
        assert (theirs / "model.safetensors").read_text() == "being sent"
    assert not list(checkpoint.parent.glob(".*publish*"))


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_interrupted_in_the_middle_the_next_run_finishes(checkpoint, hub, tmp_path, number, code):
    sketch = publish(checkpoint, "alice/x", max_shard_size="100KB", dry_run=True)
    shards = [name for name in sketch.files if name.endswith(".safetensors")]
    stalled = hub.stall("PUT", "^/lfs/", after=20_000)
    # A shell that runs the tests in the background has them, and so their processes, ignore Control-C.
    start = "import signal, trainers.cli; signal.signal(signal.SIGINT, signal.default_int_handler); trainers.cli.app()"
    command = [sys.executable, "-c", start, "publish", checkpoint, "alice/x", "--max-shard-size", "100KB"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert stalled.reached.wait(60)
        while hub.count("PUT", "^/lfs/") < len(shards) - 1:  # the others arrive
            assert process.poll() is None
        os.kill(process.pid, number)
        if number == signal.SIGINT:
            stalled.release.set()  # the client lets the files that are on their way go on
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        stalled.release.set()
    assert process.returncode == code
    assert TOKEN not in errors and (number == signal.SIGKILL or errors.strip().endswith("interrupted"))
    assert list(hub.files("alice/x")) == [".gitattributes"]
    arrived = [r.num_bytes for r in hub.requests if r.path.startswith("/lfs/") and r.status == 200]
    hub.requests.clear()
    publish(checkpoint, "alice/x", max_shard_size="100KB")
    assert hub.bytes_received("^/lfs/") == sum(sketch.files[name] for name in shards) - sum(arrived)
    assert not list(checkpoint.parent.glob(".*publish*"))  # what the killed run had written is gone
