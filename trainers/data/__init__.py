"""Data of the trainers: pictures with captions from any layout, and embeddings of frozen text models, computed once.

Importing this package loads nothing: a process that only looks embeddings up needs neither `datasets` nor Transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .on_the_fly import OnTheFlyStore
    from .pairs import PairRows, PairSource, PairStream, iter_texts, open_pairs
    from .text_encoding import encode_texts
    from .text_store import TextEmbeddingStore

_MODULES = {
    "OnTheFlyStore": "on_the_fly",
    "PairRows": "pairs",
    "PairSource": "pairs",
    "PairStream": "pairs",
    "TextEmbeddingStore": "text_store",
    "encode_texts": "text_encoding",
    "iter_texts": "pairs",
    "open_pairs": "pairs",
}

__all__ = [
    "OnTheFlyStore",
    "PairRows",
    "PairSource",
    "PairStream",
    "TextEmbeddingStore",
    "encode_texts",
    "iter_texts",
    "open_pairs",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
