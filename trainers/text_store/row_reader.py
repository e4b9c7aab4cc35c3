"""Reads embeddings by row from the shards of a text store, and proves of each that it is the one that was asked for."""

import os
import resource
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from trainers.storage.embedding_shard import EmbeddingShard, row_checksums
from trainers.storage.mapped_safetensors import DamagedFileError

from .layout import INDEX_REMEDY, open_shard


class RowReader:
    """The rows of `shards`, counted over all of them in order. Several threads may read at the same time.

    Rows are read from the files, not through a memory map: that is a microsecond a row, and what was read does not stay in the memory of the
    process, where a map of a large store would fill it.
    """

    def __init__(self, shards: Sequence[EmbeddingShard], dim: int, dtype: torch.dtype):
        self.shards, self.dim, self.dtype = shards, dim, dtype
        sizes = [shard.num_rows for shard in shards]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # first row of each shard, and the end
        self._offsets = np.array([shard.offset("embeds") for shard in shards], dtype=np.int64)  # in the files
        self._checked = np.array([shard.has_checksums for shard in shards], dtype=bool)
        # The most recently used files are open, of which a process may have a limited number. One is closed when nobody reads it any more.
        most = min(max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 1), 4096)
        self._open = lru_cache(most)(lambda number: _OpenFile(shards[number].path))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, rows: np.ndarray, keys: np.ndarray, checksums: np.ndarray) -> torch.Tensor:
        """The embeddings `(n, dim)` of some rows, each compared with its checksum; in shards without checksums, by its key alone.

        Args:
            rows: `(n,)`, counted over all shards.
            keys: of the texts that were asked for: `(n, 2)`.
            checksums: `(n,)` int64, see [`row_checksums`].

        Raises:
            ValueError: If one is not; names the file that is damaged or was replaced, and the remedy.
        """
        size = self.dim * self.dtype.itemsize
        result = torch.empty(len(rows), self.dim, dtype=self.dtype)
        memory = memoryview(result.view(torch.uint8).numpy().reshape(-1))
        order = np.argsort(rows, kind="stable")
        shards = np.searchsorted(self._starts, rows[order], side="right") - 1
        inside = rows[order] - self._starts[shards]
        offsets = self._offsets[shards] + inside * size
        for position, shard, offset in zip(order.tolist(), shards.tolist(), offsets.tolist(), strict=True):
            file = self._open(shard)
            if os.preadv(file.descriptor, [memory[position * size : (position + 1) * size]], offset) != size:
                raise self.shards[shard].damaged("it has become shorter since it was opened")
        sound = (row_checksums(result, keys) == checksums)[order]
        for i in np.flatnonzero(~self._checked[shards]).tolist():
            shard = self.shards[shards[i]]
            file = self._open(int(shards[i]))
            found = os.pread(file.descriptor, 16, shard.offset("keys") + 16 * int(inside[i]))
            sound[i] = found == keys[order[i]].tobytes()
        if not sound.all():
            wrong = int(np.argmin(sound))
            raise self._explain(self.shards[shards[wrong]], int(inside[wrong]), keys[order[wrong]])
        return result

    def _explain(self, shard: EmbeddingShard, row: int, key: np.ndarray) -> ValueError:
        """What is wrong if a `row` of a shard is not that of `key`."""
        try:
            now = open_shard(shard.path, self.dim, str(self.dtype).removeprefix("torch."))
        except OSError as error:
            return shard.damaged(f"it cannot be read any more ({error.strerror})")
        if (now.blake2b, now.num_rows) != (shard.blake2b, shard.num_rows):
            return ValueError(
                f"{shard.path} was replaced by another file while the store was open. Open the store again"
            )
        found = now.read("keys", row, row + 1).numpy()
        index = shard.path.with_name("index.safetensors")
        if ((found[0] == key).all() and now.has_checksums and not now.is_sound(row)) or not index.exists():
            return shard.wrong_row(row)
        return DamagedFileError(index, f"what it says of row {row:,} of {shard.path.name} is wrong", INDEX_REMEDY)


class _OpenFile:
    """A file whose `descriptor` is open as long as this object is held."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        os.close(self.descriptor)
