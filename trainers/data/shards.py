"""Files of rows: what all of them offer, tables that name images from elsewhere, and files in object stores."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import datasets

from trainers.storage.file_cache import cached_files
from trainers.storage.object_stores import RemoteFile, is_address

from .archives import TarShard
from .folders import split_of
from .tables import Placed, Row, TableFile
from .text_lines import Span


class Shard(Protocol):
    """A file of rows: a [`TableFile`], a [`TarShard`], or one of those below."""

    @property
    def path(self) -> str: ...

    @property
    def name(self) -> str: ...

    def columns(self) -> list[str]: ...

    def num_rows(self) -> int | None: ...

    def features(self, columns: list[str]) -> datasets.Features: ...

    def rows(self, columns: list[str] | None = None) -> Iterator[Placed]: ...

    def digest(self) -> str: ...


@dataclass(frozen=True)
class ImageTable:
    """A table whose rows name image files as seen from its own folder, and give them as seen from a folder above.

    Attributes:
        table: the file.
        root: the folder above.
        names: column -> what the file calls it.
        images: columns that name image files.
        below: take only the rows whose image lies below this folder of `root`, and
        splits: only those whose image is of one of these splits, see [`split_of`]; empty: of any.
    """

    table: TableFile
    root: str
    names: Mapping[str, str]
    images: tuple[str, ...]
    below: str = ""
    splits: tuple[str | None, ...] = ()

    @property
    def path(self) -> str:
        return self.table.path

    @property
    def name(self) -> str:
        return self.table.name

    def columns(self) -> list[str]:
        """See [`TableFile`]."""
        return list(self.names)

    def num_rows(self) -> int | None:
        """See [`TableFile`]."""
        return self.table.num_rows()

    def digest(self) -> str:
        """See [`TableFile`]."""
        return self.table.digest()

    def features(self, columns: list[str]) -> datasets.Features:
        """See [`TableFile`]."""
        features = self.table.features([self.names[name] for name in columns])
        return datasets.Features({name: features[self.names[name]] for name in columns})

    def has_spans(self) -> bool:
        """See [`TableFile`]."""
        return self.table.has_spans()

    def rows(self, columns: list[str] | None = None, span: Span | None = None) -> Iterator[Placed]:
        """See [`TableFile`]."""
        names = {name: self.names[name] for name in [*(columns or self.names), *self.images] if name in self.names}
        folder = os.path.dirname(os.path.abspath(self.path))
        for place, row in self.table.rows(list(names.values()), span):
            values: Row = {name: row.get(own) for name, own in names.items()}
            for name in self.images:
                value = values.get(name)
                if isinstance(value, str) and not is_address(value):
                    values[name] = os.path.relpath(os.path.join(folder, value), self.root)
            if self._is_taken(values.get(self.images[0])):
                yield place, values

    def _is_taken(self, image: Any) -> bool:
        if not isinstance(image, str) or not self.splits:
            return True
        return image.startswith(self.below) and split_of(image, names=False) in self.splits


@dataclass(frozen=True)
class RemoteShard:
    """A file in an object store, which is downloaded into the cache whenever it is read and not there, and may be evicted afterwards.

    What is read is the version that was listed: once another one has taken its place, reading is an error that names the file.

    Attributes:
        shard: the same shard, with its address for a path.
        file: its address, size and version.
    """

    shard: TarShard | TableFile
    file: RemoteFile

    @property
    def path(self) -> str:
        return self.shard.path

    @property
    def name(self) -> str:
        return self.shard.name

    def columns(self) -> list[str]:
        """See [`TableFile`]."""
        with self._local() as shard:
            return shard.columns()

    def num_rows(self) -> None:
        """None: the rows cannot be counted without downloading the file."""

    def features(self, columns: list[str]) -> datasets.Features:
        """See [`TableFile`]."""
        with self._local() as shard:
            return shard.features(columns)

    def rows(self, columns: list[str] | None = None) -> Iterator[Placed]:
        """See [`TableFile`] and [`TarShard`]. ValueError if a table lacks one of `columns`, which the first of its kind has."""
        with self._local() as shard:
            if isinstance(shard, TableFile) and columns is not None:
                there = shard.columns()
                missing = [column for column in columns if there and column not in there]
                if missing:
                    raise ValueError(
                        f"{self.path} has no column {missing[0]!r}, which files before it have; its columns are {', '.join(there)}"
                    )
            yield from shard.rows(columns)

    def digest(self) -> str:
        """A hash of the version that was listed, for which nothing is downloaded."""
        return hashlib.sha256(f"{self.file.size} {self.file.version}".encode()).hexdigest()

    @contextmanager
    def _local(self) -> Iterator[TarShard | TableFile]:
        """The shard as a local file. Errors name its address."""
        with cached_files(self.file.url, [self.file]) as cached:
            path = str(cached.folder / self.file.name)
            try:
                yield replace(self.shard, path=path)
            except ValueError as error:
                raise ValueError(str(error).replace(path, self.path)) from error
