"""Safetensors files that are read by pieces."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


class DamagedFileError(ValueError):
    """A file that was kept is not what was written; the message names it, what is wrong with it, and the remedy."""

    def __init__(self, path: Path, reason: str, remedy: str):
        super().__init__(f"{path} is damaged: {reason}. {remedy}")


class MappedSafetensors:
    """A safetensors file whose header is read at once, and whose tensors are memory maps or are read by rows.

    A map keeps what was read in the memory of the process, as long as the system has room; what is read by rows does not stay there.
    `torch.from_file` rather than `numpy.memmap`: it knows bfloat16, and it keeps no file descriptor, of which a store of 100 million rows
    would run out.

    Args:
        path: the file.
        expected: name -> (safetensors dtype, number of dimensions) of every tensor that the file must hold.
        remedy: what to do if the file is damaged, for messages.
        optional: the same of tensors that it may hold. It must hold no other.

    Raises:
        DamagedFileError: If the file is cut short or is not such a file.
    """

    def __init__(
        self,
        path: Path,
        expected: Mapping[str, tuple[str, int]],
        remedy: str,
        optional: Mapping[str, tuple[str, int]] | None = None,
    ):
        self.path, self.remedy = path, remedy
        status = path.stat()
        self._size, self._inode = status.st_size, status.st_ino
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
            if found != {**expected, **{name: kind for name, kind in (optional or {}).items() if name in found}}:
                raise ValueError(f"it holds {found or 'nothing'} where {dict(expected)} was expected")
            self._check_offsets()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self.damaged(str(error)) from error

    def _check_offsets(self) -> None:
        """The tensors must lie side by side, each as long as its shape says, and fill the file."""
        place = 0
        for dtype, shape, begin, end in sorted(self._tensors.values(), key=lambda tensor: tensor[2:]):
            if begin != place or end != begin + math.prod(shape) * _DTYPES[dtype].itemsize:
                raise ValueError("the places of its tensors do not fit their shapes")
            place = end
        if self._start + place != self._size:
            raise ValueError(f"it has {self._size:,} bytes where its header tells of {self._start + place:,}")

    def check_size(self) -> None:
        """Raises DamagedFileError if the file was cut short since it was opened: reading its map would end the process."""
        now = os.stat(self.path)
        if now.st_ino == self._inode and now.st_size < self._size:
            raise self.damaged("it has become shorter since it was opened")

    def damaged(self, reason: str) -> DamagedFileError:
        """The error to raise for this file."""
        return DamagedFileError(self.path, reason, self.remedy)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`, from the header."""
        return self._tensors[name][1]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` as a view of the memory map. Only read it."""
        if self._data is None:
            self._data = torch.from_file(str(self.path), shared=False, size=self._size, dtype=torch.uint8)
        dtype, shape, begin, end = self._tensors[name]
        return self._data[self._start + begin : self._start + end].view(_DTYPES[dtype]).view(shape)

    def offset(self, name: str) -> int:
        """Where in the file the tensor `name` begins, in bytes."""
        return self._start + self._tensors[name][2]

    def read(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows `begin` to `end` of the tensor `name`, in memory of their own. DamagedFileError if the file has become shorter."""
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
                    raise self.damaged("it has become shorter since it was opened")
                filled += count
        return data.view(_DTYPES[dtype]).view(end - begin, *shape[1:])
