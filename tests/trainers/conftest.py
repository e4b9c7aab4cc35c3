"""Fixtures of several test modules."""

import pytest

from tests.object_server import Bucket, object_server
from tests.trainers.fake_encoder import FakeEncoder


@pytest.fixture
def encoder(monkeypatch) -> FakeEncoder:
    """Takes the place of model and processor in `TextEmbeddingStore.build`."""
    return FakeEncoder(monkeypatch)


@pytest.fixture(scope="session")
def s3_server():
    with object_server() as url:
        yield url


@pytest.fixture
def bucket(s3_server, tmp_path, monkeypatch) -> Bucket:
    """An empty bucket of a stand-in for S3."""
    return Bucket(s3_server, tmp_path / "cache-of-files", monkeypatch)
