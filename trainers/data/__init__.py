"""Data of the trainers: pictures with captions from any layout, and embeddings of frozen text models, computed once."""

from .pairs import PairRows, PairSource, PairStream, iter_texts, open_pairs
from .text_encoding import encode_texts
from .text_store import TextEmbeddingStore


__all__ = [
    "PairRows",
    "PairSource",
    "PairStream",
    "TextEmbeddingStore",
    "encode_texts",
    "iter_texts",
    "open_pairs",
]
