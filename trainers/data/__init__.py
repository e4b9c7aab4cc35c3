"""Data of the trainers: images with captions from any layout, and embeddings of frozen text models, computed once.

Importing this package loads nothing: a process that only looks embeddings up needs neither `datasets` nor Transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trainers.text_store.encoding import encode_texts
    from trainers.text_store.on_the_fly import OnTheFlyStore
    from trainers.text_store.store import TextEmbeddingStore

    from .languages import BalancedLanguages
    from .pairs import PairRows, PairSource, PairStream, iter_texts, open_pairs
    from .text_files import divide_texts

_MODULES = {
    "BalancedLanguages": "trainers.data.languages",
    "OnTheFlyStore": "trainers.text_store.on_the_fly",
    "PairRows": "trainers.data.pairs",
    "PairSource": "trainers.data.pairs",
    "PairStream": "trainers.data.pairs",
    "TextEmbeddingStore": "trainers.text_store.store",
    "divide_texts": "trainers.data.text_files",
    "encode_texts": "trainers.text_store.encoding",
    "iter_texts": "trainers.data.pairs",
    "open_pairs": "trainers.data.pairs",
}

__all__ = [
    "BalancedLanguages",
    "OnTheFlyStore",
    "PairRows",
    "PairSource",
    "PairStream",
    "TextEmbeddingStore",
    "divide_texts",
    "encode_texts",
    "iter_texts",
    "open_pairs",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
