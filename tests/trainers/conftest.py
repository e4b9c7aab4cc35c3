"""Fixtures of several test modules."""

import pytest

from tests.trainers.fake_encoder import FakeEncoder


@pytest.fixture
def encoder(monkeypatch) -> FakeEncoder:
    """Takes the place of model and processor in `TextEmbeddingStore.build`."""
    return FakeEncoder(monkeypatch)


@pytest.fixture(scope="session")
def s3_server():
    from tests.object_server import object_server  # packages that the oldest environment does not have

    with object_server() as url:
        yield url


@pytest.fixture
def bucket(s3_server, tmp_path, monkeypatch):
    """An empty [`~tests.object_server.Bucket`] of a stand-in for S3."""
    from tests.object_server import Bucket

    return Bucket(s3_server, tmp_path / "cache-of-files", monkeypatch)
