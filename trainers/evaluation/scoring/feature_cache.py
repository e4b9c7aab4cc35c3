"""Embeddings of images and texts on the disk, found by content, so that an evaluation that was stopped goes on where it was.

A cache is a directory `<images|texts>-<hash of the fingerprint>/` with `cache.json`, which says what made the embeddings, and shards of
at most 512 rows, each written whole or not at all. An embedding is found by the hash of the text, or of the bytes of the image's file:
what several benchmarks, languages or prompts share is computed once, and so is an image that is in a data set twice. Every row has a
checksum, which is compared when it is read, and every shard says which fingerprint it is of: see [`EmbeddingShard`].
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainers.storage.embedding_shard import EmbeddingShard, shard_content
from trainers.storage.files import TEMPORARY_SUFFIX, write_file
from trainers.text_store.keys import find_keys, sort_order
from trainers.text_store.row_reader import RowReader


# Rows in a shard: what a killed process loses at most.
SHARD_SIZE = 512
_REMEDY = "Delete this file and evaluate again: only what it held is embedded anew"


class FeatureCache:
    """The embeddings that one encoder gave, by content.

    Args:
        folder: of all caches.
        kind: "images" or "texts".
        fingerprint: what made the embeddings, as JSON.
        rank: rank of this process; each writes its own shards.

    Raises:
        ValueError: If a file is damaged; names it and the remedy.
    """

    def __init__(self, folder: Path, kind: str, fingerprint: dict[str, Any], rank: int = 0):
        text = json.dumps(fingerprint, sort_keys=True, ensure_ascii=False)
        self._hash = hashlib.sha256(text.encode()).hexdigest()
        self.path = folder / f"{kind}-{self._hash[:16]}"
        self.rank = rank
        self._fingerprint = fingerprint
        self._shards: dict[str, EmbeddingShard] = {}
        self.refresh()

    def __len__(self) -> int:
        return self._keys.shape[1]

    def prepare(self) -> None:
        """Makes the directory, and removes what a killed process left half-written. For one process, before any writes."""
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob("*" + TEMPORARY_SUFFIX):
            leftover.unlink()
        if not (self.path / "cache.json").exists():
            write_file(self.path / "cache.json", json.dumps(self._fingerprint, indent=2, ensure_ascii=False).encode())

    def refresh(self) -> None:
        """Opens the shards that were written since, by this process or by others."""
        for file in sorted(self.path.glob("shard-*.safetensors")):
            if file.name not in self._shards:
                shard = self._shards[file.name] = EmbeddingShard(file, "float32", None, _REMEDY, self._hash)
                if not shard.has_checksums:
                    raise shard.damaged("it has no checksums")
        shards = list(self._shards.values())
        self._reader = RowReader(shards, shards[0].dim if shards else 0, torch.float32)
        keys = np.concatenate([np.empty((0, 2), np.int64), *(shard.read_keys() for shard in shards)])
        checksums = [np.empty(0, np.int64), *(shard.read("checksums").numpy() for shard in shards)]
        self._rows = sort_order(keys)
        self._keys, self._checksums = np.ascontiguousarray(keys[self._rows].T), np.concatenate(checksums)

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Places in `keys (N, 2)` of those that are not in the cache, of equal ones the first: sorted `(M,)` int64."""
        absent = np.flatnonzero(find_keys(self._keys, keys) < 0)
        return np.sort(absent[np.unique(keys[absent], axis=0, return_index=True)[1]])

    def add(self, keys: np.ndarray, embeds: torch.Tensor) -> None:
        """Writes one shard of `embeds (n, dim)` float32 with `keys (n, 2)`. Found only after [`refresh`]."""
        taken = {file.name for file in self.path.glob(f"shard-{self.rank:04d}-*.safetensors")}
        number = len(taken)
        while (name := f"shard-{self.rank:04d}-{number:06d}.safetensors") in taken:
            number += 1
        write_file(self.path / name, shard_content(embeds.contiguous(), keys, self._hash))

    def blocks(self, keys: np.ndarray, size: int = 4096) -> Iterator[torch.Tensor]:
        """The embeddings of `keys (N, 2)` in their order, `size` at a time: `(n, dim)` float32. KeyError if one is not there, DamagedFileError if
        one is not what was written with this key.
        """
        places = find_keys(self._keys, keys)
        if (places < 0).any():
            raise KeyError(f"{int((places < 0).sum())} embeddings are not in the cache {self.path}")
        rows = self._rows[places]
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            yield self._reader.read(some, keys[start : start + size], self._checksums[some])


class ShardWriter:
    """Collects embeddings as they come and writes them to a cache in shards; what is left when its `with` block ends, too. `keys (N, 2)` are those of
    all items, and `name_item` says what messages call the item at a place in `keys`.
    """

    def __init__(self, cache: FeatureCache, keys: np.ndarray, name_item: Callable[[int], str]):
        self.cache, self.keys, self.name_item = cache, keys, name_item
        self._places: list[int] = []
        self._embeds: list[torch.Tensor] = []

    def add(self, places: Iterable[int], embeds: torch.Tensor) -> None:
        """`embeds (n, dim)` of the items at `places` in `keys`. ValueError names an item whose embedding is not finite."""
        places = list(places)
        embeds = embeds.float().cpu()
        bad = (~torch.isfinite(embeds)).any(dim=1).nonzero()
        if len(bad):
            raise ValueError(
                f"the embedding of {self.name_item(places[int(bad[0])])} is not finite: the model is broken, or its numbers do not fit "
                "the dtype (try --model-dtype float32)"
            )
        self._places += places
        self._embeds.append(embeds)
        if len(self._places) >= SHARD_SIZE:
            self.flush()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()  # Control-C and errors too: what was computed is kept

    def flush(self) -> None:
        """Writes what is collected."""
        if self._places:
            self.cache.add(self.keys[np.array(self._places)], torch.cat(self._embeds))
            self._places, self._embeds = [], []


def content_keys(contents: Sequence[bytes]) -> np.ndarray:
    """The 128-bit BLAKE2b hashes of `contents`, as two 64-bit integers each: `(len(contents), 2)` int64."""
    digests = b"".join(hashlib.blake2b(content, digest_size=16).digest() for content in contents)
    return np.frombuffer(digests, dtype="<i8").reshape(-1, 2)
