"""Files of embeddings that are kept and read again: each row with its key, and with a checksum that is compared whenever the row is read.

A shard is a safetensors file with `embeds` (n, dim), `keys` (n, 2) int64, `checksums` (n,) int64, and in its metadata the BLAKE2b hashes of
`embeds` and `keys`, and what made them: a shard that was copied from the folder of another encoder is found by that. A checksum belongs to an embedding and its key, so a row that belongs to another key is found as a flipped bit is. It is
of a row rather than of a file or a block, because a store of many gigabytes is opened at once and looked up in at random; it takes 8 bytes
on the disk and a fraction of a microsecond (XXH3, which runs at the speed of memory).
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from xxhash import xxh3_64_intdigest

from .mapped_safetensors import DamagedFileError, MappedSafetensors


DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # name in torch -> name in safetensors
_BLOCK = 4096  # rows read at a time where all are read


class EmbeddingShard(MappedSafetensors):
    """An open shard. Opening it reads the header only.

    Args:
        path: the file.
        dtype: "float32", "float16" or "bfloat16", of the embeddings.
        dim: their size; None accepts any.
        remedy: what to do if the file is damaged, for messages.
        made_by: the hash of what makes the embeddings of this folder; None accepts any, and so does a shard of an earlier release, which does not
            say.

    Attributes:
        num_rows, dim: from the header.
        has_checksums: False for a shard of an earlier release.
        blake2b: the hashes of "embeds" and "keys" that were written with them.

    Raises:
        DamagedFileError: If the file is cut short, holds other tensors, shapes or dtypes, or was made by something else.
    """

    def __init__(self, path: Path, dtype: str, dim: int | None, remedy: str, made_by: str | None = None):
        super().__init__(
            path, {"embeds": (DTYPES[dtype], 2), "keys": ("I64", 2)}, remedy, optional={"checksums": ("I64", 1)}
        )
        self.num_rows = self.shape("keys")[0]
        self.dim = self.shape("embeds")[1] if dim is None else dim
        self.has_checksums = "checksums" in self
        if (
            self.shape("keys") != (self.num_rows, 2)
            or self.shape("embeds") != (self.num_rows, self.dim)
            or (self.has_checksums and self.shape("checksums") != (self.num_rows,))
        ):
            raise self.damaged(
                f"embeds {self.shape('embeds')} and keys {self.shape('keys')} do not fit embeddings of size {self.dim}"
            )
        facts = self._read_facts()
        self.blake2b = {name: facts[name] for name in ("embeds", "keys")}
        if made_by is not None and facts.get("made_by", made_by) != made_by:
            raise self.damaged("its embeddings were made by another encoder than those of this folder")
        self._keys_are_sound = False

    def _read_facts(self) -> dict[str, str]:
        try:
            facts = dict(json.loads(self.metadata["blake2b"]))
        except (KeyError, ValueError, TypeError):
            facts = {}
        if not facts.keys() >= {"embeds", "keys"}:
            raise self.damaged("it has no checksums")
        return facts

    def read_keys(self) -> np.ndarray:
        """All keys `(num_rows, 2)`, compared with their hash when they are read first."""
        keys = self.read("keys")
        if not self._keys_are_sound and blake2b(keys) != self.blake2b["keys"]:
            raise self.damaged("its keys have changed since they were written")
        self._keys_are_sound = True
        return keys.numpy()

    def blocks(self) -> Iterator[torch.Tensor]:
        """All embeddings in order, `(n, dim)` with n at most 4,096, compared with their checksums where the shard has some."""
        for begin in range(0, self.num_rows, _BLOCK):
            embeds = self.read("embeds", begin, begin + _BLOCK)
            if self.has_checksums:
                keys, checksums = (self.read(name, begin, begin + _BLOCK).numpy() for name in ("keys", "checksums"))
                sound = row_checksums(embeds, keys) == checksums
                if not sound.all():
                    raise self.wrong_row(begin + int(np.argmin(sound)))
            yield embeds

    def is_sound(self, row: int) -> bool:
        """Whether one embedding is what its checksum says."""
        embeds, keys, checksums = (self.read(name, row, row + 1) for name in ("embeds", "keys", "checksums"))
        return bool((row_checksums(embeds, keys.numpy()) == checksums.numpy()).all())

    def wrong_row(self, row: int) -> DamagedFileError:
        """The error of an embedding that is not what its checksum says."""
        return self.damaged(f"the embedding in row {row:,} is not what was written there")

    def problem(self) -> str | None:
        """What is wrong with embeddings and keys, all of which are read; None if they are sound. [`blocks`] compares the checksums of the rows."""
        for name, expected in sorted(self.blake2b.items()):
            if blake2b(self.read(name)) != expected:
                return f"its {name} have changed since they were written"
        return None


def shard_content(embeds: torch.Tensor, keys: np.ndarray, made_by: str) -> bytes:
    """The file of a shard with `embeds (n, dim)` and `keys (n, 2)` int64, made by what has the hash `made_by`. Equal contents have equal bytes."""
    keys = np.array(keys, dtype=np.int64)
    tensors = {"embeds": embeds, "keys": torch.from_numpy(keys)}
    # One entry: safetensors orders several at random.
    facts = {**{name: blake2b(tensor) for name, tensor in tensors.items()}, "made_by": made_by}
    metadata = {"blake2b": json.dumps(facts)}
    checksums = torch.from_numpy(row_checksums(embeds, keys))
    return save({**tensors, "checksums": checksums}, metadata=metadata)


def row_checksums(embeds: torch.Tensor, keys: np.ndarray) -> np.ndarray:
    """The checksum `(n,)` int64 of each row of `embeds (n, dim)` and `keys (n, 2)`: XXH3-64 of the embedding's bytes, bound to the key."""
    rows = embeds.contiguous().view(torch.uint8).numpy()
    hashes = np.fromiter(map(xxh3_64_intdigest, rows), np.uint64, len(rows))
    return hashes.view(np.int64) ^ keys[:, 0] ^ keys[:, 1]


def blake2b(data: torch.Tensor) -> str:
    """The 128-bit BLAKE2b hash of the bytes of `data`, in hexadecimal digits."""
    return hashlib.blake2b(data.contiguous().view(torch.uint8).numpy().data, digest_size=16).hexdigest()
