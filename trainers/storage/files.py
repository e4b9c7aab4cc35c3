"""Files that are written as a whole or not at all, also after a power cut."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save


TEMPORARY_SUFFIX = ".tmp"


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes `tensors` to `path` as a whole or not at all. `metadata` should have one entry: safetensors orders several at random, and equal contents should
    have equal bytes.
    """
    write_file(path, save(tensors, metadata=metadata))


def write_file(path: Path, data: bytes) -> None:
    """Writes `data` to `path` by [`replacing`] it."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, beside `path`, that replaces `path` as a whole when the block ends. Raises what [`writing`] raises."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with writing(temporary, path) as file:
        yield file
    put_in_place(temporary, path)


@contextmanager
def writing(temporary: Path, path: Path) -> Iterator[BinaryIO]:
    """A file to write at `temporary`, which is on the disk when the block ends, and gone if that fails. OSError names `path`, which it is to become."""
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


def put_in_place(temporary: Path, path: Path) -> None:
    """Renames `temporary` to `path`, so that the new name too is on the disk before anybody relies on it."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Puts the names of the files in `folder` on the disk; Windows has no such call, and does so itself."""
    if os.name == "nt":
        return
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
