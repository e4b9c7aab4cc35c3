"""Safetensors files that are read by pieces."""

import json
from pathlib import Path

import torch


_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


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
