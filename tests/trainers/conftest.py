"""Fixtures of several test modules."""

import pytest

from tests.trainers.fake_encoder import FakeEncoder


@pytest.fixture
def encoder(monkeypatch) -> FakeEncoder:
    """Takes the place of model and processor in `TextEmbeddingStore.build`."""
    return FakeEncoder(monkeypatch)
