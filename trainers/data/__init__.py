"""Data of the trainers: embeddings of frozen text models, computed once."""

from .text_encoding import encode_texts
from .text_store import TextEmbeddingStore


__all__ = ["TextEmbeddingStore", "encode_texts"]
