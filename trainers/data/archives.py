"""Reads shards as WebDataset lays them out: a tar whose neighbouring files `KEY.jpg`, `KEY.txt` are the fields of a row. They are read to their end."""

import bz2
import gzip
import lzma
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import datasets

from trainers.storage.digests import file_digest

from .tables import Placed
from .text_lines import parse_json


ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

# The column that says why a row cannot be used. Such a row counts as broken, and is no error of the whole shard.
BROKEN = "__broken__"

_TEXTS = ("txt", "text", "transcript", "caption")
_NUMBERS = ("cls", "cls2", "index", "inx", "id")
_COMPRESSIONS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
_HEAD = 200  # members that tell which fields a shard has
_BLOCK = 512  # bytes
_MOST_BYTES = 1 << 30  # of a field


@dataclass(frozen=True)
class TarShard:
    """A shard: its file, the fields that hold text whatever their ending says, and what messages call it."""

    path: str
    texts: tuple[str, ...] = ()
    name: str = ""

    def columns(self) -> list[str]:
        """Names of the fields, as the first rows have them."""
        return list(dict.fromkeys(field for _, _, field, _ in islice(self._members([]), _HEAD)))

    def num_rows(self) -> None:
        """A shard does not tell how many rows it has."""

    def digest(self) -> str:
        """The SHA-256 of the file, see [`file_digest`]."""
        return file_digest(self.path)

    def features(self, columns: list[str]) -> datasets.Features:
        """The types of the fields `columns`, by their endings."""
        types = {"json": datasets.Json(), "text": datasets.Value("string"), "number": datasets.Value("int64")}
        return datasets.Features(
            {name: types.get(self._type(name)) or datasets.Image(decode=False) for name in columns}
        )

    def rows(self, columns: list[str] | None = None) -> Iterator[Placed]:
        """The rows in their order: each a field's content under its name, those of images as `{"bytes", "path"}`, and "__key__". ValueError names an archive
        that is damaged or was cut short, also at the end of a row.
        """
        row: dict[str, Any] = {}
        for member, key, field, data in self._members(columns):
            if row and row["__key__"] != key:
                yield row["__key__"], row
                row = {}
            row["__key__"] = key
            if field in row:
                raise ValueError(f"{self.path}: the row {key} has two members .{field}")
            if columns is None or field in columns:
                try:
                    row[field] = self._decode(member, field, data)
                except ValueError as error:
                    row[field], row[BROKEN] = None, f".{field}: {error}"
        if row:
            yield row["__key__"], row

    def _type(self, field: str) -> str:
        ending = field.rpartition(".")[2]
        if ending in ("json", "jsn"):
            return "json"
        if ending in _TEXTS or field in self.texts:
            return "text"
        return "number" if ending in _NUMBERS else "image"

    def _decode(self, member: tarfile.TarInfo, field: str, data: bytes | None) -> Any:
        if data is None:
            raise ValueError(f"it is a link, sparse, or larger than {_MOST_BYTES >> 30} GiB: pack the file itself")
        kind = self._type(field)
        if kind == "image":
            return {"bytes": data, "path": member.name}
        if kind == "number":
            return int(data)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"it is not encoded as UTF-8: byte {error.start + 1} is 0x{data[error.start]:02X}"
            ) from error
        if "\0" in text:
            raise ValueError("it is not encoded as UTF-8: it holds a zero byte")
        return parse_json(text, "it") if kind == "json" else text

    def _members(self, columns: list[str] | None) -> Iterator[tuple[tarfile.TarInfo, str, str, bytes | None]]:
        """The members that are fields of rows, up to the archive's end: each with its row's key, its field and, of those `columns`, its content."""
        try:
            with ExitStack() as opened:
                file: IO[bytes] = opened.enter_context(open(self.path, "rb"))
                head = file.read(6)
                file.seek(0)
                for mark, decompress in _COMPRESSIONS.items():
                    if head.startswith(mark):
                        file = opened.enter_context(decompress(file))
                tar = opened.enter_context(tarfile.open(fileobj=file, mode="r:"))
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else all members of a large shard stay in memory
                    key, field = _key_and_field(member.name)
                    if not field or member.isdir():
                        continue
                    data = None
                    if (columns is None or field in columns) and _can_be_read(member):
                        data = tar.extractfile(member).read()  # type: ignore[union-attr]  # a regular file has content
                    yield member, key, field, data
                _check_end(file, tar.offset)
        except (GeneratorExit, KeyboardInterrupt):
            raise
        except (
            Exception
        ) as error:  # of tarfile and the decompressors: OSError, EOFError, zlib.error, MemoryError and others
            raise ValueError(
                f"{self.path} cannot be read to its end: {type(error).__name__}: {error}. Fetch or make it again, or leave it out"
            ) from error


def _can_be_read(member: tarfile.TarInfo) -> bool:
    """Whether a member is a file, of a size that is meant: a sparse one of a few bytes may claim terabytes."""
    return member.isreg() and not member.issparse() and member.size <= _MOST_BYTES


def _check_end(file: IO[bytes], offset: int) -> None:
    """ReadError unless an archive ends at `offset`: zeros up to the end of the file, at least a block of them."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise tarfile.ReadError(
            f"it was cut short at byte {offset + len(block)}: the mark of an archive's end is missing"
        )
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"the header at byte {offset} is damaged")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(
                "more follows behind its end: archives that were joined have to be packed again as one"
            )


def _key_and_field(name: str) -> tuple[str, str]:
    """The row that a member belongs to, and its field: the name up to the first dot of the last part, and the rest. Empty if it is no data."""
    folder, base = os.path.split(name)
    if base.startswith((".", "__")) or re.search(r"(^|/)__MACOSX(/|$)", folder):
        return "", ""
    stem, dot, field = base.partition(".")
    return (os.path.join(folder, stem), field.lower()) if dot else ("", "")


def is_shard(path: str | Path) -> bool:
    """Whether the ending of `path` is one of `ENDINGS`."""
    return str(path).lower().endswith(ENDINGS)
