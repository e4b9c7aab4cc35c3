"""Folders that are written as a whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, beside `folder`, that takes its place when the block ends."""
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    put_folder_in_place(folder)


def partial_folder(folder: Path) -> Path:
    """Where `folder` is while it is being written. One that a killed program left behind is in the way of nothing."""
    return folder.with_name(folder.name + ".partial")


def put_folder_in_place(folder: Path) -> None:
    """Let the [`partial_folder`] of `folder` take its place."""
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder(folder).rename(folder)
