"""Divides the rows that were found into parts, each of which is read without reading the others.

Files are taken as one sequence of bytes, which is cut into parts of equal length. Where a file is cut, a row belongs to the part that
has its first byte. A file that cannot be read from the middle (CSV, JSON, Arrow, an archive, any file in an object store, which is downloaded
whole) belongs to the part that has the file's first byte. A table of `datasets` is divided by its rows, or by its files where it is streamed.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeGuard

import datasets

from .shards import ImageTable, RemoteShard, Shard
from .sources import FoundRows
from .tables import Placed, TableFile
from .text_lines import Span


@dataclass(frozen=True)
class FileSpan:
    """A span of a file of rows: a [`Shard`] of its own."""

    file: TableFile | ImageTable
    span: Span

    @property
    def path(self) -> str:
        return self.file.path

    @property
    def name(self) -> str:
        return self.file.name

    def columns(self) -> list[str]:
        """See [`TableFile`]."""
        return self.file.columns()

    def num_rows(self) -> None:
        """None: the rows of a span are not counted."""

    def features(self, columns: list[str]) -> datasets.Features:
        """See [`TableFile`]."""
        return self.file.features(columns)

    def digest(self) -> str:
        """A hash of the file, and the span."""
        return f"{self.file.digest()} {self.span}"

    def rows(self, columns: list[str] | None = None) -> Iterator[Placed]:
        """The rows whose first byte is in the span."""
        return self.file.rows(columns, self.span)


class Division:
    """The rows that were found, to be read in parts. Until a part is read, only the sizes of the files are looked at."""

    def __init__(self, found: FoundRows):
        self.found = found

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of each file; empty for a table."""
        return [
            shard.file.size if isinstance(shard, RemoteShard) else os.path.getsize(shard.path)
            for shard in self.found.shards
        ]

    @cached_property
    def _ends(self) -> list[int]:
        """Where each file ends in the sequence of all. An empty file counts as one byte, so that some part reads it: it may be damaged."""
        return list(accumulate(max(size, 1) for size in self.sizes))

    def identity(self) -> dict[str, Any]:
        """What tells these rows from others without reading them, as JSON: names and sizes of the files, or the number of rows of a table."""
        if self.found.shards:
            return {"bytes": {shard.name: size for shard, size in zip(self.found.shards, self.sizes, strict=True)}}
        table = self.found.table
        if isinstance(table, datasets.IterableDataset):
            return {"source": self.found.name, "num_files": table.num_shards}
        return {"num_rows": len(table)}

    def most_parts(self) -> int | None:
        """How many parts have rows at most: the number of files, where these cannot be cut; None if there is no such bound."""
        if self.found.shards:
            return None if _can_be_cut(self.found.shards[0]) else len(self.found.shards)
        table = self.found.table
        return table.num_shards if isinstance(table, datasets.IterableDataset) else len(table)

    def part(self, index: int, count: int) -> FoundRows | None:
        """Part `index` of `count`; None if it has no rows."""
        if self.found.shards:
            shards = list(self._shards(index, count))
            return replace(self.found, shards=shards) if shards else None
        table = self._rows_of_table(index, count)
        return None if table is None else replace(self.found, table=table)

    def _shards(self, index: int, count: int) -> Iterator[Shard]:
        ends = self._ends
        begin, end = (ends[-1] * number // count for number in (index, index + 1))
        for number in range(bisect_right(ends, begin), len(ends)):
            shard, start = self.found.shards[number], ends[number - 1] if number else 0
            if start >= end:
                break
            if begin <= start and ends[number] <= end:
                yield shard
            elif _can_be_cut(shard):
                yield FileSpan(shard, (max(begin - start, 0), min(end, ends[number]) - start))
            elif begin <= start:
                yield shard

    def _rows_of_table(self, index: int, count: int) -> Any:
        table: Any = self.found.table
        if isinstance(table, datasets.IterableDataset):
            count = min(count, table.num_shards)
            return table.shard(num_shards=count, index=index) if index < count else None
        begin, end = (len(table) * number // count for number in (index, index + 1))
        return table.select(range(begin, end)) if begin < end else None


def _can_be_cut(shard: Shard) -> TypeGuard[TableFile | ImageTable]:
    return isinstance(shard, TableFile | ImageTable) and shard.has_spans()
