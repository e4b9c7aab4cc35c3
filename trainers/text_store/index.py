"""The index of a text store: sorted keys, and the row of each. It is made in bounded memory, mapped, and made anew when it does not fit the shards.

Keys are hashes, so their first halves are spread evenly over all 64-bit integers. To sort more of them than fit into memory, the integers are
divided into ranges of equal width, and each pass over the shards sorts the keys of one range and writes them behind those of the range
before. A pass reads 16 bytes a text; 100 million texts take 24 passes over 1.6 GB.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import Timeout

from trainers.storage.files import replacing

from .files import MappedSafetensors, damaged
from .keys import sort_order
from .layout import shard_checksums, store_lock


logger = logging.getLogger(__name__)

KEYS_IN_MEMORY = 1 << 22  # keys that are sorted at a time; with what sorting takes, about 650 MB
_LOWEST, _WIDTH = -(1 << 63), 1 << 64  # of 64-bit integers


class Index(NamedTuple):
    """
    Attributes:
        keys: `(2, N)` int64: the halves of every key, sorted by the first and then by the second.
        rows: `(N,)` int64: the row of each, counted over all shards in order.
    """

    keys: np.ndarray
    rows: np.ndarray


def open_index(path: Path, shards: Sequence[MappedSafetensors]) -> Index:
    """The index of the store at `path`, mapped from its file, which is made where there is none or it belongs to other shards.

    In a directory that cannot be written the index is kept in memory, at 24 bytes a text.
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
        parts = list(_sorted_parts(shards, KEYS_IN_MEMORY))
        keys = np.concatenate([np.empty((2, 0), np.int64), *(keys for keys, _ in parts)], axis=1)
        return Index(keys, np.concatenate([np.empty(0, np.int64), *(rows for _, rows in parts)]))


def map_index(path: Path, digest: str) -> Index:
    """The index in the file, mapped.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged or not of the shards with this digest.
    """
    file = MappedSafetensors(path / "index.safetensors", {"keys": ("I64", 2), "rows": ("I64", 1)})
    if file.metadata.get("shards_blake2b") != digest:
        raise damaged(file.path, "it belongs to other shards")
    return Index(file.tensor("keys").numpy(), file.tensor("rows").numpy())


def write_index(path: Path, shards: Sequence[MappedSafetensors], keys_in_memory: int = KEYS_IN_MEMORY) -> None:
    """Writes the index file of `shards`, with about `keys_in_memory` keys in memory at a time."""
    total = sum(shard.shape("keys")[0] for shard in shards)
    header = {
        "__metadata__": {"shards_blake2b": shards_digest(shards)},
        "keys": {"dtype": "I64", "shape": [2, total], "data_offsets": [0, 16 * total]},
        "rows": {"dtype": "I64", "shape": [total], "data_offsets": [16 * total, 24 * total]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path / "index.safetensors") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start, done = 8 + len(text), 0
        file.truncate(start + 24 * total)
        for (first, second), rows in _sorted_parts(shards, keys_in_memory):
            for column, values in enumerate((first, second, rows)):
                file.seek(start + 8 * (column * total + done))
                file.write(np.ascontiguousarray(values).data)
            done += len(rows)


def shards_digest(shards: Sequence[MappedSafetensors]) -> str:
    """What tells these shards, in this order, from others: their names and their keys."""
    names = "".join(f"{shard.path.name} {shard_checksums(shard)['keys']}\n" for shard in shards)
    return hashlib.blake2b(names.encode(), digest_size=16).hexdigest()


def _sorted_parts(shards: Sequence[MappedSafetensors], keys_in_memory: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys `(2, n)`, sorted, and their rows `(n,)`, one range of keys after another."""
    total = sum(shard.shape("keys")[0] for shard in shards)
    passes = -(-total // keys_in_memory)
    for number in range(passes):
        lowest = _LOWEST + _WIDTH * number // passes
        highest = _LOWEST + _WIDTH * (number + 1) // passes - 1
        keys, rows, start = [], [], 0
        for shard in shards:
            of_shard = shard.read("keys").numpy()
            inside = np.flatnonzero((of_shard[:, 0] >= lowest) & (of_shard[:, 0] <= highest))
            keys.append(of_shard[inside])
            rows.append(inside + start)
            start += len(of_shard)
        joined = np.concatenate(keys)
        del keys
        order = sort_order(joined)
        yield np.ascontiguousarray(joined[order].T), np.concatenate(rows)[order]
