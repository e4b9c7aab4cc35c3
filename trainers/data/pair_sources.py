"""Opens images with captions, or captions alone, from whatever layout, with the images left undecoded."""

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets

from .archives import is_shard
from .data_folder import DataFolder, NamedFiles
from .folders import read_beside
from .pair_source import PairSource
from .sources import FoundRows, find_rows
from .tables import value_at


NAMES = ("__key__", "__url__")  # what webdataset calls a row and its shard, where `datasets` reads it

_PEEKED = 100  # rows that are looked at before all are read


@dataclass
class RawRows:
    """An opened source.

    Attributes:
        name: name of the source, for messages.
        table: rows with the images undecoded: a `datasets.Dataset`, or a `datasets.IterableDataset` if it is streamed.
        image_columns: columns of a row's image, the first that has one; empty if images are not read.
        text_columns: columns of a row's captions.
        teacher_text_columns: columns that the teacher of stage 1 reads in their place; empty if it reads the captions.
        files: what rows may name.
        text_files: columns that hold the path of a file with the captions.
        shards: names of the files that `table` is read from, where they are read here; else empty.
    """

    name: str
    table: Any
    image_columns: list[str]
    text_columns: list[str]
    teacher_text_columns: list[str]
    files: NamedFiles | None
    text_files: tuple[str, ...]
    shards: list[str]

    def texts_table(self) -> datasets.Dataset:
        """The rows by number without their images."""
        return self.table.select_columns([name for name in self.table.column_names if name not in self.image_columns])


def open_rows(source: PairSource, *, images: bool = True, streaming: bool | None = None) -> RawRows:
    """Opens `source`, with `images` or without. FileNotFoundError and ValueError as [`open_pairs`]."""
    streaming = source.streaming if streaming is None else streaming
    return read_found(find_rows(source, streaming=streaming), source, images=images, streaming=streaming)


def read_found(found: FoundRows, source: PairSource, *, images: bool, streaming: bool) -> RawRows:
    """As [`open_rows`], of rows that were found."""
    image_columns = source.columns("image_column") if images else []
    text_columns, teacher_columns = source.columns("text_columns"), source.columns("teacher_text_columns")
    if found.shards and is_shard(found.shards[0].path):  # their fields are in lower case
        image_columns = [column.lower() for column in image_columns]
        text_columns, teacher_columns = _lower_heads(text_columns), _lower_heads(teacher_columns)
    texts = list(dict.fromkeys([*text_columns, *teacher_columns]))
    columns = found.columns([*image_columns, *(column.partition(".")[0] for column in texts)])
    _check_columns(found, columns, image_columns, text_columns, teacher_columns)
    image_columns = [column for column in image_columns if column in columns]
    heads = [*image_columns, *(_head(column, columns) for column in texts)]
    heads = list(dict.fromkeys([*heads, *(name for name in NAMES if name in columns)]))
    _check_nested(found, heads, columns, texts)
    files = found.files
    if image_columns and source.image_folder is not None:
        first = next(found.rows(image_columns), {})
        names = [value for column in image_columns if isinstance(value := first.get(column), str)]
        files = files.settled(names[0]) if isinstance(files, DataFolder) and names else files
    return RawRows(
        found.name,
        found.stream(heads) if streaming else found.by_number(heads),
        image_columns,
        text_columns,
        teacher_columns,
        files,
        found.text_files,
        [shard.name for shard in found.shards],
    )


def check_captions(found: FoundRows, columns: Sequence[str]) -> None:
    """ValueError that says how to caption images if the source is a folder of images without captions."""
    if found.text_files and columns in (["image"], ["image", "label"]):
        raise ValueError(
            f"{found.name} holds images but no captions: put a metadata.jsonl there (one line an image: "
            '{"file_name": "a.jpg", "text": "..."}) or a .txt beside each image, or name the file with the captions'
        )


def missing_column(where: str, column: str, columns: Sequence[str], purpose: str = "") -> ValueError:
    """The error of a column that is not there; proposes the nearest."""
    close = difflib.get_close_matches(column, columns, 1) or difflib.get_close_matches(
        column.partition(".")[0], columns, 1
    )
    return ValueError(
        f"{where} has no column {column!r}{purpose}; its columns are {', '.join(columns) or 'none'}"
        + (f"; did you mean {close[0]!r}?" if close else "")
    )


def _lower_heads(columns: list[str]) -> list[str]:
    return [".".join([head.lower(), *rest]) for head, *rest in (column.split(".") for column in columns)]


def _check_columns(
    found: FoundRows, columns: list[str], image_columns: list[str], text_columns: list[str], teacher_columns: list[str]
) -> None:
    """ValueError if the rows lack a column that is to be read."""
    if image_columns and not any(column in columns for column in image_columns):
        names = " or ".join(map(repr, image_columns))
        there = ", ".join(columns) or "none"
        raise ValueError(f"{found.name} has no column {names} for the images (image_column); its columns are {there}")
    check_captions(found, columns)
    for column in text_columns:
        if _head(column, columns) not in columns:
            raise missing_column(found.name, column, columns, " for the captions (text_columns, or --column)")
    for column in teacher_columns:
        if _head(column, columns) not in columns:
            purpose = " for the texts that the teacher reads (teacher_text_columns)"
            raise missing_column(found.name, column, columns, purpose)


def _check_nested(found: FoundRows, heads: list[str], columns: list[str], texts: list[str]) -> None:
    """ValueError if a column that reaches into an object reaches nothing in any of the first rows; proposes the nearest."""
    nested = {column: column.split(".") for column in texts if column not in columns}
    if not nested:
        return
    there: dict[str, dict[str, None]] = {column: {} for column in nested}
    for row in islice(
        found.rows([head for head in heads if head in {parts[0] for parts in nested.values()}]), _PEEKED
    ):
        for column, (*parts, _) in nested.items():
            value: Any = row
            if parts[0] in found.text_files and found.files is not None and row[parts[0]] is not None:
                with suppress(OSError, ValueError):  # a broken row, which is counted when it is read
                    value = {parts[0]: read_beside(str(found.files.find(row[parts[0]])))}
            value = value_at(value, ".".join(parts))
            if isinstance(value, Mapping):
                there[column] |= dict.fromkeys(map(str, value))
    for column, names in there.items():
        *parts, last = nested[column]
        if names and last not in names:
            raise missing_column(found.name, column, [".".join([*parts, name]) for name in names], " for the captions")


def _head(column: str, columns: Sequence[str]) -> str:
    """The column that `column` is, or reaches into: "json" of "json.caption"."""
    return column if column in columns else column.partition(".")[0]
