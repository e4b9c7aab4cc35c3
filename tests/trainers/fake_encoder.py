"""A stand-in for model and processor, for tests of the text store where only the files matter."""

from pathlib import Path

import torch

from trainers.data import TextEmbeddingStore
from trainers.text_store import build as store_build
from trainers.text_store import encoding as text_encoding
from trainers.text_store.encoding import EncodedBatch


DIM = 6


def fake_embedding(text: str) -> torch.Tensor:
    seed = int.from_bytes(text.encode()[:7], "little")
    return torch.randn(DIM, generator=torch.Generator().manual_seed(seed)) + 3


class FakeEncoder:
    """Stands in for model and processor where only the files matter. Counts the texts that it embeds."""

    def __init__(self, monkeypatch, embed=fake_embedding):
        self.embedded: list[str] = []
        self.fingerprint = {
            "model": "a",
            "revision": None,
            "weights_sha256": "00",
            "pooling": "mean",
            "max_length": 64,
        }

        def encode(texts, model, processor, *, token_budget):
            self.embedded += texts
            for indices in torch.randperm(len(texts)).split(7):
                yield EncodedBatch(indices.tolist(), torch.stack([embed(texts[i]) for i in indices]), 0)

        monkeypatch.setattr(store_build, "encode_texts", encode)
        monkeypatch.setattr(text_encoding, "encoder_fingerprint", lambda model, processor: dict(self.fingerprint))

    def build(self, texts, path, **kwargs) -> TextEmbeddingStore:
        return TextEmbeddingStore.build(texts, None, None, path, **{"shard_size": 10, "progress": False, **kwargs})


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.is_file()}
