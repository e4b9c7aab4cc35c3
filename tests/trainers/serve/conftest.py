"""A tiny checkpoint, the service that answers with it, and a client that needs no socket."""

import pytest
from starlette.testclient import TestClient

from tests.trainers.tiny_encoders import tiny_proclip
from trainers.evaluation.scoring.encoders import Encoder
from trainers.serve.app import make_app
from trainers.serve.service import EmbeddingService, Limits


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return Encoder(*tiny_proclip(max_length=64), "tiny")


@pytest.fixture
def client(encoder):
    service = EmbeddingService(encoder, Limits(inputs=8, body_bytes=20_000, batch_tokens=100))
    with TestClient(make_app(service)) as client:
        yield client
    assert not service.healthy  # closed with the application
