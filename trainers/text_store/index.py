"""The index of a text store: sorted keys, with row and checksum of each. It is made in bounded memory, mapped, and made anew when it does not fit the shards.

Keys are hashes, so their first halves are spread evenly over all 64-bit integers. To sort more of them than fit into memory, the integers are
divided into ranges of equal width, and each pass over the shards sorts the keys of one range and writes them behind those of the range
before. A pass reads 24 bytes a text; 100 million texts take 24 passes over 2.4 GB.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout
from xxhash import xxh3_128

from trainers.storage.embedding_shard import EmbeddingShard
from trainers.storage.files import replacing
from trainers.storage.mapped_safetensors import MappedSafetensors

from .keys import find_keys, sort_order
from .layout import INDEX_REMEDY, store_lock


logger = logging.getLogger(__name__)

KEYS_IN_MEMORY = 1 << 22  # keys that are sorted at a time; with what sorting takes, about 650 MB
_PIECE = 1 << 20  # rows that are compared with the checksum at a time
_LOWEST, _WIDTH = -(1 << 63), 1 << 64  # of 64-bit integers


class StaleIndexError(ValueError):
    """The index file is of other shards, or of an earlier release: it is made anew, and nothing is damaged."""


@dataclass
class Index:
    """The keys of a store in order, and where their rows are.

    Attributes:
        keys: `(2, N)` int64: the halves of every key, sorted by the first and then by the second.
        rows: `(N,)` int64: the row of each, counted over all shards in order.
        checksums: `(N,)` int64: of the row and its key, as the shard has it; 0 if the shard has none.
        file: that they are mapped from; None if they are in memory.
        checksum: of all of them, as it was written with them.
    """

    keys: np.ndarray
    rows: np.ndarray
    checksums: np.ndarray
    file: MappedSafetensors | None = None
    checksum: str = ""

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and checksum of each of `keys (n, 2)`, -1 and 0 where it is missing: two arrays `(n,)` int64. Before a key is called missing for the first
        time the whole index is compared with its checksum; DamagedFileError if that does not fit.
        """
        if self.file is not None:
            self.file.check_size()
        positions = find_keys(self.keys, keys)
        found = positions >= 0
        rows, checksums = np.full(len(keys), -1, dtype=np.int64), np.zeros(len(keys), dtype=np.int64)
        rows[found], checksums[found] = self.rows[positions[found]], self.checksums[positions[found]]
        if ((rows[found] < 0) | (rows[found] >= len(self.rows))).any():
            raise self._damaged("it names a row that no shard has")
        if not found.all():
            self.check()
        return rows, checksums

    def check(self) -> None:
        """Raises DamagedFileError if anything is not what was written. Reads all of them, once."""
        if self.file is None or not self.checksum:
            return
        digests = [xxh3_128() for _ in range(4)]
        for begin in range(0, len(self.rows), _PIECE):
            for digest, column in zip(digests, (*self.keys, self.rows, self.checksums), strict=True):
                digest.update(np.ascontiguousarray(column[begin : begin + _PIECE]).data)
        if _joined(digests) != self.checksum:
            raise self._damaged("its content has changed since it was written")
        self.checksum = ""

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(reason) if self.file is None else self.file.damaged(reason)


def open_index(path: Path, shards: Sequence[EmbeddingShard]) -> Index:
    """The index of the store at `path`, mapped from its file, which is made where there is none or it belongs to other shards. In a directory that cannot
    be written the index is kept in memory, at 32 bytes a text.
    """
    digest = shards_digest(shards)
    try:
        return map_index(path, digest)
    except (FileNotFoundError, ValueError):
        pass
    try:
        with store_lock(path, "index"):
            try:
                return map_index(path, digest)  # by the process that was waited for
            except (FileNotFoundError, ValueError):
                write_index(path, shards)
                return map_index(path, digest)
    except (PermissionError, OSError, Timeout) as error:
        logger.warning("the index of %s is kept in memory, because it cannot be written: %s", path, error)
        parts = [np.empty((4, 0), np.int64), *_sorted_parts(shards, KEYS_IN_MEMORY)]
        whole = np.concatenate(parts, axis=1)
        return Index(whole[:2], whole[2], whole[3])


def map_index(path: Path, digest: str) -> Index:
    """The index in the file, mapped.

    Raises:
        FileNotFoundError: If there is none.
        StaleIndexError: If it is not of the shards with this digest.
        DamagedFileError: If it is cut short or no such file.
    """
    columns = {"keys": ("I64", 2), "rows": ("I64", 1)}
    file = MappedSafetensors(path / "index.safetensors", columns, INDEX_REMEDY, optional={"checksums": ("I64", 1)})
    facts = file.metadata.get("shards_and_checksum", "").split()
    if len(facts) != 2 or facts[0] != digest or "checksums" not in file:
        raise StaleIndexError(f"{file.path} belongs to other shards, or was written by an earlier release")
    if file.shape("keys") != (2, *file.shape("rows")) or file.shape("rows") != file.shape("checksums"):
        raise file.damaged("its tensors are not of one length")
    keys, rows, checksums = (file.tensor(name).numpy() for name in ("keys", "rows", "checksums"))
    return Index(keys, rows, checksums, file, facts[1])


def write_index(path: Path, shards: Sequence[EmbeddingShard], keys_in_memory: int = KEYS_IN_MEMORY) -> None:
    """Writes the index file of `shards`, with about `keys_in_memory` keys in memory at a time."""
    total, digests = sum(shard.num_rows for shard in shards), [xxh3_128() for _ in range(4)]
    start = len(_header(shards, total, digests))
    with replacing(path / "index.safetensors") as file:
        file.truncate(start + 32 * total)
        done = 0
        for part in _sorted_parts(shards, keys_in_memory):
            for column, values in enumerate(part):
                digests[column].update(values.data)
                file.seek(start + 8 * (column * total + done))
                file.write(values.data)
            done += part.shape[1]
        file.seek(0)
        file.write(_header(shards, total, digests))


def _header(shards: Sequence[EmbeddingShard], total: int, digests: Sequence[Any]) -> bytes:
    """The first bytes of an index file of `total` rows. As long whatever the digests are."""
    header = {
        # One entry, as safetensors orders several at random.
        "__metadata__": {"shards_and_checksum": f"{shards_digest(shards)} {_joined(digests)}"},
        "keys": {"dtype": "I64", "shape": [2, total], "data_offsets": [0, 16 * total]},
        "rows": {"dtype": "I64", "shape": [total], "data_offsets": [16 * total, 24 * total]},
        "checksums": {"dtype": "I64", "shape": [total], "data_offsets": [24 * total, 32 * total]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _joined(digests: Sequence[Any]) -> str:
    return "".join(digest.hexdigest() for digest in digests)


def shards_digest(shards: Sequence[EmbeddingShard]) -> str:
    """What tells these shards, in this order, from others: their names and the hashes of their content."""
    names = "".join(f"{shard.path.name} {shard.blake2b['keys']} {shard.blake2b['embeds']}\n" for shard in shards)
    return hashlib.blake2b(names.encode(), digest_size=16).hexdigest()


def _sorted_parts(shards: Sequence[EmbeddingShard], keys_in_memory: int) -> Iterator[np.ndarray]:
    """Both halves of the keys, sorted, their rows and their checksums: `(4, n)` int64, one range of keys after another."""
    total = sum(shard.num_rows for shard in shards)
    passes = -(-total // keys_in_memory)
    for number in range(passes):
        lowest = _LOWEST + _WIDTH * number // passes
        highest = _LOWEST + _WIDTH * (number + 1) // passes - 1
        parts, start = [], 0
        for shard in shards:
            keys = shard.read_keys()
            inside = np.flatnonzero((keys[:, 0] >= lowest) & (keys[:, 0] <= highest))
            checksums = shard.read("checksums").numpy()[inside] if shard.has_checksums else np.zeros_like(inside)
            parts.append(np.stack([*keys[inside].T, inside + start, checksums]))
            start += len(keys)
        joined = np.concatenate(parts, axis=1)
        del parts
        yield np.ascontiguousarray(joined[:, sort_order(joined[:2].T)])
