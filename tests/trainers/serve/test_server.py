"""The command itself: what it accepted is answered when SIGTERM comes, and it ends with code 0."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn
from typer.testing import CliRunner

from tests.trainers.tiny_encoders import tiny_proclip
from trainers.cli import app


CLIENTS = 24
# Batches of about two texts that take a third of a second each, so that requests are waiting when the signal comes.
SLOW = """
import time
from trainers.evaluation.scoring.encoders import Encoder
encode = Encoder.encode_texts
def slow(self, texts, token_budget=None):
    time.sleep(0.3)
    return encode(self, texts, token_budget)
Encoder.encode_texts = slow
from trainers.cli import app
app()
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    for part in tiny_proclip():
        part.save_pretrained(folder)
    return folder


def embed(address, text):
    body = json.dumps({"input": text}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/embeddings", body), timeout=60) as answer:
        return len(json.load(answer)["data"])


def test_nothing_that_was_accepted_is_lost_on_sigterm(checkpoint):
    command = [sys.executable, "-c", SLOW, "serve", str(checkpoint), "--port", "0", "--batch-tokens", "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            assert line.startswith("serving tiny on http://127.0.0.1:"), server.stderr.read()
            address = line.split()[-1]
            with ThreadPoolExecutor(CLIENTS) as clients:
                answers = [clients.submit(embed, address, f"text {number}") for number in range(CLIENTS)]
                while accepted(address) < CLIENTS:
                    time.sleep(0.05)
                server.send_signal(signal.SIGTERM)
                assert [answer.result() for answer in answers] == [1] * CLIENTS
            _, errors = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 0 and "Traceback" not in errors, errors


def accepted(address):
    """Texts that wait, or have been in a batch."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        values = dict(line.split(" ") for line in answer.read().decode().splitlines() if not line.startswith("#"))
    return float(values["proclip_waiting_inputs"]) + float(values["proclip_batch_inputs_sum"])


def test_an_answer_is_sent_at_once(checkpoint, monkeypatch):
    """uvicorn writes headers and body one by one; the body must not wait for an acknowledgement of the headers."""
    settings = []

    def accept_one(self, sockets):
        with socket.create_connection(sockets[0].getsockname()), sockets[0].accept()[0] as accepted:
            settings.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(uvicorn.Server, "run", accept_one)
    result = CliRunner().invoke(app, ["serve", str(checkpoint), "--port", "0"])
    assert result.exit_code == 0 and settings[0] != 0, result.output


def test_a_port_that_is_taken_is_one_line(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", str(checkpoint), "--port", port])
    assert (
        result.exit_code == 1 and f"error: cannot listen on 127.0.0.1, port {port}: Address already" in result.stderr
    )
