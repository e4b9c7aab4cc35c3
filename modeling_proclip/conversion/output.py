"""Writing a checkpoint: tensor after tensor, in a folder that appears only when it is complete."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from .errors import ConversionError
from .stored_tensors import DTYPES


MAX_SHARD_BYTES = 5 * 10**9
_LOCK = "lock"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: what the header says of it, and how to make it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `output` when the block ends, and is removed where anything raises.

    A new `output` appears by renaming, complete. One that is there and empty may be a mount point, the current folder or behind a link, which
    renaming cannot replace: it is filled, config.json last, without which nothing takes it for a checkpoint. Any other is refused.
    """
    output = output.resolve()
    parent, prefix = (output if output.is_dir() else output.parent), f".{output.name}.partial-"
    remove_leftovers(parent, prefix)
    if output.exists() and (not output.is_dir() or {entry.name for entry in output.iterdir()} - {"lost+found"}):
        raise ConversionError(
            f"{output} is there already, and is not an empty folder: name another output, or remove it."
        )
    parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(parent, prefix) as files:
        yield files
        for file in files.rglob("*"):
            if file.is_file():
                with file.open("r+b") as stream:
                    os.fsync(stream.fileno())
        if parent == output:
            for file in sorted(files.iterdir(), key=lambda file: file.name == "config.json"):
                file.rename(output / file.name)
        else:
            _put_in_place(files, output)


def _put_in_place(files: Path, output: Path) -> None:
    try:
        files.rename(output)
    except OSError as error:
        if not output.exists():
            raise
        raise ConversionError(f"{output} was written by somebody else meanwhile: name another output.") from error


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """An empty folder in a new one in `parent`, whose name begins with `prefix`; both are removed at the end.

    What killed runs left under the same prefix is removed first. A lock beside the folder tells it from that of a run that goes on, which is
    let alone.
    """
    remove_leftovers(parent, prefix)
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with FileLock(scratch / _LOCK, timeout=0):
            (scratch / "files").mkdir()
            yield scratch / "files"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove the folders of [`scratch_folder`] whose run is over."""
    for scratch in parent.iterdir() if parent.is_dir() else ():
        if scratch.name.startswith(prefix) and (scratch / _LOCK).is_file():
            try:
                with FileLock(scratch / _LOCK, timeout=0):
                    shutil.rmtree(scratch, ignore_errors=True)
            except Timeout:
                continue


def plan_shards(tensors: list[PlannedTensor], max_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[PlannedTensor]]:
    """File names and the tensors of each: one `model.safetensors`, or shards of at most `max_bytes` (or of one tensor larger than that)."""
    shards: list[list[PlannedTensor]] = [[]]
    num_bytes = 0
    for tensor in tensors:
        if shards[-1] and num_bytes + tensor.num_bytes > max_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(tensor)
        num_bytes += tensor.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def write_tensors(folder: Path, tensors: list[PlannedTensor], max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `tensors` as safetensors, with an index if there are shards. Holds one tensor in memory at a time."""
    shards = plan_shards(tensors, max_bytes)
    for name, shard in shards.items():
        _write_safetensors(folder / name, shard)
    _write_index(folder, shards)


def sketch_tensors(folder: Path, tensors: list[PlannedTensor], max_bytes: int = MAX_SHARD_BYTES) -> None:
    """The files of [`write_tensors`] in name, header and size, without the tensors: they take no space where the disk has sparse files."""
    shards = plan_shards(tensors, max_bytes)
    for name, shard in shards.items():
        header = _header(shard)
        with (folder / name).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(tensor.num_bytes for tensor in shard))
    _write_index(folder, shards)


def _write_index(folder: Path, shards: dict[str, list[PlannedTensor]]) -> None:
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for shard in shards.values() for tensor in shard)},
            "weight_map": {tensor.name: name for name, shard in shards.items() for tensor in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _header(tensors: list[PlannedTensor]) -> bytes:
    # The safetensors library writes from tensors that are all in memory; the format is a length, a JSON header and the bytes in order.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _write_safetensors(file: Path, tensors: list[PlannedTensor]) -> None:
    with file.open("wb") as stream:
        stream.write(_header(tensors))
        for tensor in tensors:
            made = tensor.make()
            if tuple(made.shape) != tensor.shape or made.dtype != tensor.dtype:
                raise AssertionError(f"{tensor.name} became {tuple(made.shape)} of {made.dtype}")
            stream.write(made.contiguous().view(-1).view(torch.uint8).numpy())
