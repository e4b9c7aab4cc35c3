"""Keys of 128 bits and how they are found; safetensors files that are written in one piece and read by pieces."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors.torch import save


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


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes `tensors` to `path` so that the file is there as a whole or not at all, also after a power cut.

    `metadata` has one entry: safetensors orders several at random, and equal stores must have equal bytes.
    """
    write_file(path, save(tensors, metadata=metadata))


def write_file(path: Path, data: bytes) -> None:
    """Writes `data` to `path` by [`replacing`] it."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, beside `path`, that becomes `path` as a whole when the block ends. Errors as of [`writing`]."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with writing(temporary, path) as file:
        yield file
    publish(temporary, path)


@contextmanager
def writing(temporary: Path, path: Path) -> Iterator[BinaryIO]:
    """A file to write at `temporary`, which is on the disk when the block ends, and gone if that fails.

    Raises:
        OSError: If the disk is full or the directory cannot be written; names `path`, which the file is to become.
    """
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = f"could not be written ({error.strerror}); what was written before is kept"
        raise OSError(error.errno, reason, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Renames `temporary` to `path`, so that the new name too is on the disk before anybody relies on it."""
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def damaged(path: Path, reason: str) -> ValueError:
    """The error for a shard or index that cannot be what a text store wrote, with the remedy."""
    return ValueError(
        f"{path} is damaged or was not written by a text store: {reason}. Delete this file and build the store again with the same texts: "
        "only what this file held is computed anew"
    )


class MappedSafetensors:
    """A safetensors file whose header is read at once, and whose tensors are memory maps or are read by rows.

    A map keeps what was read in the memory of the process, as long as the system has room; what is read by rows does not stay there.
    `torch.from_file` rather than `numpy.memmap`: it knows bfloat16, and it keeps no file descriptor, of which a store of 100 million rows
    would run out.

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

    def offset(self, name: str) -> int:
        """Where in the file the tensor `name` begins, in bytes."""
        return self._start + self._tensors[name][2]

    def read(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows `begin` to `end` of the tensor `name`, in memory of their own. ValueError if the file has become shorter."""
        dtype, shape, start, stop = self._tensors[name]
        begin, end, _ = slice(begin, end).indices(shape[0])
        row_size = (stop - start) // max(shape[0], 1)
        data = torch.empty((end - begin) * row_size, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._start + start + begin * row_size)
            view, filled = memoryview(data.numpy()), 0
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise damaged(self.path, "it has become shorter since it was opened")
                filled += count
        return data.view(_SAFETENSORS_DTYPES[dtype]).view(end - begin, *shape[1:])
