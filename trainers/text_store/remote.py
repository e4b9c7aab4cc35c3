"""Text stores in object stores: read through the cache of files, never written."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.display.progress import track
from trainers.storage.file_cache import CachedFiles, cached_files
from trainers.storage.object_stores import RemoteFile, is_address, list_remote

from .keys import text_keys
from .layout import LOCKS


if TYPE_CHECKING:
    from .store import TextEmbeddingStore

_CHUNK = 4096  # texts hashed and looked up at a time


def fetch_store(url: str) -> CachedFiles:
    """Downloads the text store at an address into the cache: all of it, as texts are looked up at random. A shard that is in the cache is not downloaded
    again, so a store that has grown costs only its new shards. FileNotFoundError if there is no store; OSError if it does not fit into the cache.
    """
    folder = url.rstrip("/") + "/"
    files = [file for file in list_remote(url) if file.url == folder + file.name and _is_of_store(file.name)]
    if not any(file.name == "store.json" for file in files):
        raise FileNotFoundError(f"{url} is not a text store: it has no store.json")
    cached = cached_files(folder, files, _shown)
    (cached.folder / LOCKS).mkdir(exist_ok=True)  # to make an index, if it was not uploaded
    return cached


def check_directory(path: str | Path) -> None:
    """ValueError if a store that is to be filled in tasks is at an address, where tasks cannot be locked."""
    if is_address(path):
        raise ValueError(
            f"tasks need a directory, and a store at an address is only read: fill one in a directory and copy it to {path}"
        )


def check_complete(store: "TextEmbeddingStore", texts: Iterable[str]) -> int:
    """Checks that a store that is only read has all of `texts`, and returns their number. ValueError names some that it lacks and says how to add them."""
    num_texts, texts = 0, iter(texts)
    while chunk := list(islice(texts, _CHUNK)):
        found = store.find(text_keys(chunk)) >= 0
        if not found.all():
            missing = [text for text, there in zip(chunk, found, strict=True) if not there]
            raise ValueError(store.missing_message(missing))
        num_texts += len(chunk)
    return num_texts


def _is_of_store(name: str) -> bool:
    return name in ("store.json", "index.safetensors") or (name.startswith("shard-") and name.endswith(".safetensors"))


def _shown(files: Sequence[RemoteFile]) -> Iterable[RemoteFile]:
    return track(files, "downloading the text store", "files")
