"""Files and keys of a text store: safetensors written in one piece and read through memory maps; 128-bit keys and how they are found."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # name in torch -> name in safetensors
LOCK_NAME = "store.lock"
TEMPORARY_SUFFIX = ".tmp"
_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def text_keys(texts: Sequence[str]) -> np.ndarray:
    """The 128-bit BLAKE2b hashes of `texts` in UTF-8, as two 64-bit integers each: `(num_texts, 2)` int64.

    Among 100 million texts two share a key with a chance of about 1e-23.

    Raises:
        TypeError: If an item is not a string; names its position.
        ValueError: If an item is no valid Unicode (a lone surrogate); names its position.
    """
    digests = bytearray()
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text number {position} is no string but {type(text).__name__}: {text!r}")
        try:
            digests += hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        except UnicodeEncodeError as error:
            raise ValueError(f"text number {position} is no valid Unicode ({error}): {text!r}") from error
    return np.frombuffer(bytes(digests), dtype="<i8").reshape(-1, 2)


def sort_order(keys: np.ndarray) -> np.ndarray:
    """Indices `(num_keys,)` that sort `keys (num_keys, 2)` by their first and then by their second half."""
    return np.lexsort((keys[:, 1], keys[:, 0]))


def find_keys(sorted_keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Positions of `wanted` in `sorted_keys`, -1 for those that are not there.

    Args:
        sorted_keys: `(2, num_keys)` int64: both halves of every key, each half contiguous, in the order of [`sort_order`].
        wanted: `(num_wanted, 2)` int64.

    Returns:
        `(num_wanted,)` int64.
    """
    first, second = sorted_keys
    positions = np.searchsorted(first, wanted[:, 0])
    found = np.full(len(wanted), -1, dtype=np.int64)
    # The binary search reads the first halves only. Where several keys share one, step on until the second half agrees too.
    searching = np.arange(len(wanted))
    while searching.size:
        searching = searching[positions[searching] < first.size]
        searching = searching[first[positions[searching]] == wanted[searching, 0]]
        agrees = second[positions[searching]] == wanted[searching, 1]
        found[searching[agrees]] = positions[searching[agrees]]
        searching = searching[~agrees]
        positions[searching] += 1
    return found


class KeySet:
    """A set of keys that grows by arrays, at 16 bytes a key: a Python set of 100 million keys would need 10 GB.

    Sorted runs are merged when the last is no longer than the one that comes after it, so there are at most log2(n) of them.
    """

    def __init__(self):
        self._runs: list[np.ndarray] = []  # each (2, n), sorted

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Which of `keys (n, 2)` are in the set: `(n,)` bool."""
        known = np.zeros(len(keys), dtype=bool)
        for run in self._runs:
            known |= find_keys(run, keys) >= 0
        return known

    def add(self, keys: np.ndarray) -> None:
        """Adds `keys (n, 2)`, none of which is in the set yet."""
        while self._runs and self._runs[-1].shape[1] <= len(keys):
            keys = np.concatenate([keys, self._runs.pop().T])
        self._runs.append(np.ascontiguousarray(keys[sort_order(keys)].T))


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes `tensors` to `path` so that the file is there as a whole or not at all, also after a power cut.

    `metadata` has one entry: safetensors orders several at random, and equal stores must have equal bytes.
    """
    write_file(path, save(tensors, metadata=metadata))


def write_file(path: Path, data: bytes) -> None:
    """Writes `data` to a temporary file beside `path`, then renames it. A failed write leaves nothing behind.

    Raises:
        OSError: If the disk is full or the directory cannot be written; names the file and the remedy.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the new name too must be on the disk before anybody relies on it
        finally:
            os.close(directory)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"could not write {len(data):,} bytes ({error.strerror}); what was written before is kept",
            str(path),
        ) from error


def damaged(path: Path, reason: str) -> ValueError:
    """The error for a shard or index that cannot be what a text store wrote, with the remedy."""
    return ValueError(
        f"{path} is damaged or was not written by a text store: {reason}. Delete this file and build the store again with the same texts: "
        "only what this file held is computed anew"
    )


class MappedSafetensors:
    """A safetensors file whose header is read at once and whose tensors are memory maps: reading rows reads only their pages.

    `torch.from_file` rather than `numpy.memmap`: it knows bfloat16, and it keeps no file descriptor, of which a store of 100 million rows
    (12,000 shards) would run out.

    Args:
        path: the file.
        expected: name -> (safetensors dtype, number of dimensions) of every tensor that the file must hold, and no other.

    Raises:
        ValueError: If the file is cut short or is not such a file; names the file and the remedy.
    """

    def __init__(self, path: Path, expected: dict[str, tuple[str, int]]):
        self.path = path
        self._size = path.stat().st_size
        self._data: torch.Tensor | None = None
        try:
            with open(path, "rb") as file:
                header_size = int.from_bytes(file.read(8), "little")
                if header_size + 8 > self._size:
                    raise ValueError("its header is cut short")
                header = json.loads(file.read(header_size))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._start = 8 + header_size
            self._tensors = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
            found = {name: (dtype, len(shape)) for name, (dtype, shape, _, _) in self._tensors.items()}
            if found != expected:
                raise ValueError(f"it holds {found or 'nothing'} where {expected} was expected")
            size = self._start + max(end for _, _, _, end in self._tensors.values())
            if size != self._size:
                raise ValueError(f"it has {self._size:,} bytes where its header tells of {size:,}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path, str(error)) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`, from the header."""
        return self._tensors[name][1]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` as a view of the memory map. Only read it."""
        if self._data is None:
            self._data = torch.from_file(str(self.path), shared=False, size=self._size, dtype=torch.uint8)
        dtype, shape, begin, end = self._tensors[name]
        return self._data[self._start + begin : self._start + end].view(_SAFETENSORS_DTYPES[dtype]).view(shape)


def write_shard(path: Path, embeds: torch.Tensor, keys: np.ndarray) -> None:
    """Writes the next shard, or the first that is missing: one deleted because it was damaged comes back in its place."""
    taken = {file.name for file in shard_paths(path)}
    name = next(name for name in (f"shard-{number:05d}.safetensors" for number in count()) if name not in taken)
    metadata = {"keys_blake2b": hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()}
    write_safetensors(path / name, {"embeds": embeds, "keys": torch.from_numpy(keys)}, metadata)


def shard_paths(path: Path) -> list[Path]:
    """The shards of the store at `path`, in the order in which their rows are counted."""
    return sorted(path.glob("shard-*.safetensors"), key=lambda file: (len(file.name), file.name))


def open_shard(path: Path, dim: int, dtype: str) -> MappedSafetensors:
    """The shard at `path`; ValueError if it does not fit a store of this `dim` and `dtype`."""
    shard = MappedSafetensors(path, {"embeds": (DTYPES[dtype], 2), "keys": ("I64", 2)})
    num_texts = shard.shape("keys")[0]
    if shard.shape("keys") != (num_texts, 2) or shard.shape("embeds") != (num_texts, dim):
        raise damaged(
            path, f"embeds {shard.shape('embeds')} and keys {shard.shape('keys')} do not fit a store of dim {dim}"
        )
    if "keys_blake2b" not in shard.metadata:
        raise damaged(path, "it has no keys_blake2b")
    return shard


def read_settings(path: Path) -> dict[str, Any] | None:
    """What store.json says, None where there is none."""
    file = path / "store.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings["format"] != FORMAT_VERSION:
            raise ValueError(f"its format is {settings['format']!r}, and this version reads format {FORMAT_VERSION}")
        if (
            settings["dtype"] not in DTYPES
            or not isinstance(settings["dim"], int)
            or not isinstance(settings["fingerprint"], dict)
        ):
            raise ValueError("dim, dtype or fingerprint makes no sense")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} cannot be read as the description of a text store: {error!r}. Restore it, or build a new store elsewhere"
        ) from error
    return settings


def write_settings(path: Path, dim: int, dtype: str, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Writes the store.json of a new store and returns what it says."""
    settings = {"format": FORMAT_VERSION, "dim": dim, "dtype": dtype, "fingerprint": fingerprint}
    write_file(path / "store.json", (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
    return settings


def make_directory(path: Path) -> None:
    """Makes the directory of a store. ValueError if it is there and holds something else."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"{path} is a file: a text store is a directory") from error
    foreign = [
        entry.name for entry in path.iterdir() if entry.name != LOCK_NAME and not entry.name.endswith(TEMPORARY_SUFFIX)
    ]
    # After the listing: store.json is written before the first shard, so another process that starts a store here is no stranger.
    if foreign and not (path / "store.json").exists():
        raise ValueError(
            f"{path} is no text store (no store.json) but holds other files such as {foreign[0]!r}: choose another directory"
        )


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Held by the one process that writes the store at `path`; another one says so and waits.

    The operating system releases it, however the process ends. Temporary files that a killed writer left are deleted.
    """
    lock = FileLock(path / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is writing the text store %s: waiting for it", path)
        lock.acquire()
    try:
        for leftover in path.glob("*" + TEMPORARY_SUFFIX):
            leftover.unlink()  # of a writer that was killed
        yield
    finally:
        lock.release()
