"""Reads tables, one file at a time: CSV, JSON, Parquet, Arrow, plain texts and published captions files. What would be lost or changed is refused.

A caption is text and stays it: nothing in a CSV becomes a number, a date or a missing value.
"""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from trainers.storage.digests import file_digest

from .caption_files import TOKEN_ENDINGS, coco_rows, is_coco, is_karpathy, karpathy_rows, token_rows
from .text_lines import Span, line_name, parse_json, read_lines


Row = dict[str, Any]
# A row's place in its file, such as "line 7", and its values.
Placed = tuple[str, Row]

_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_FLICKR_HEADERS = (["image", "caption"], ["image_name", "comment_number", "comment"])
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
_HEAD = 100  # rows that tell which columns a file without a header has


@dataclass(frozen=True)
class TableFile:
    """A file of rows.

    Attributes:
        path: path of the file. Its ending tells its kind, see `KINDS`.
        split: the split to read from a file that names the split of each row (Karpathy's); "train+restval" joins two.
        name: what messages call the file.
    """

    path: str
    split: str | None = None
    name: str = ""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        kind = kind_of(self.path)
        assert kind is not None
        return "csv" if kind == "text" and _has_header(self.path) else kind

    def columns(self) -> list[str]:
        """Names of the columns; of a file without a header, those of the first rows."""
        if self.kind == "csv":
            return [name for name in next(_csv_records(self.path))[1] if name]
        if self.kind == "text":
            return ["text"]
        if self.kind in ("parquet", "arrow"):
            return list(_arrow_schema(self.path, self.kind).names)
        return list(dict.fromkeys(name for _, row in islice(self.rows(), _HEAD) for name in row))

    def declares_splits(self) -> bool:
        """Whether the file itself says which split a row belongs to, as Karpathy's do."""
        return self.kind == "json" and is_karpathy(_json_content(self.path))

    def num_rows(self) -> int | None:
        """How many rows there are, or about so, where the file tells it without being parsed."""
        if self.kind == "parquet":
            return _parquet_file(self.path).metadata.num_rows
        if self.kind in ("text", "json lines"):
            with open(self.path, "rb") as file:
                return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        return None

    def digest(self) -> str:
        """The SHA-256 of the file, see [`file_digest`]."""
        return file_digest(self.path)

    def features(self, columns: list[str]) -> datasets.Features:
        """The types of `columns`: text in CSV, whatever JSON holds in JSON, and in Parquet and Arrow those of the file."""
        if self.kind in ("parquet", "arrow"):
            schema = _arrow_schema(self.path, self.kind)
            return datasets.Features({name: _feature(schema, name) for name in columns})
        plain = self.kind in ("csv", "text")
        return datasets.Features({name: datasets.Value("string") if plain else datasets.Json() for name in columns})

    def has_spans(self) -> bool:
        """Whether [`rows`] can read a span of the file without reading what comes before."""
        return self.kind in ("text", "json lines", "parquet")

    def rows(self, columns: list[str] | None = None, span: Span | None = None) -> Iterator[Placed]:
        """The rows in their order, or those of a span; those of Parquet and Arrow files with `columns` only. ValueError names the file, and the line or row,
        where it is damaged or not made as its ending says.
        """
        if self.kind == "json lines":
            return _json_lines_rows(self.path, span)
        if self.kind == "text":
            return _text_rows(self.path, span)
        if self.kind == "parquet":
            return _batch_rows(self.path, *_parquet_batches(self.path, columns, span))
        assert span is None
        if self.kind == "csv":
            return _csv_rows(self.path)
        if self.kind == "json":
            return _json_rows(self.path, self.split)
        if self.kind == "token":
            return token_rows(self.path)
        _, batches = _arrow_file(self.path)
        return _batch_rows(self.path, (batch if columns is None else batch.select(columns) for batch in batches))


def kind_of(path: str | Path) -> str | None:
    """One of `KINDS`, or None of a file that is no table."""
    name = Path(path).name.lower()
    return next((kind for kind, endings in KINDS.items() if name.endswith(endings)), None)


def _has_header(path: str) -> bool:
    """Whether a text file is Flickr's `captions.txt`, a table of images and captions under the ending of a text."""
    first = next(read_lines(path), "")
    return [name.strip() for name in first.split(_delimiter(first, path))] in _FLICKR_HEADERS


def value_at(row: Any, column: str) -> Any:
    """What lies at `column` in a row: under that name, or at "json.captions.0" in the objects and lists of it. None if there is nothing."""
    if isinstance(row, Mapping) and column in row:
        return row[column]
    for step in column.split("."):
        if isinstance(row, list):
            row = row[int(step)] if step.isdecimal() and int(step) < len(row) else None
        else:
            row = row.get(step) if isinstance(row, Mapping) else None
    return row


def _csv_rows(path: str) -> Iterator[Placed]:
    records = _csv_records(path)
    _, header, delimiter = next(records)
    for line, fields, _ in records:
        if len(fields) != len(header):
            raise ValueError(
                f"{path}, line {line}: {len(fields)} fields where the header names {len(header)} ({', '.join(filter(None, header))}); a text "
                f"that holds a {_DELIMITERS[delimiter]} or a line break needs double quotes around it"
            )
        for number, (name, value) in enumerate(zip(header, fields, strict=True)):
            if not name and number and value.strip():  # the first one is the number of the row, as pandas writes it
                raise ValueError(
                    f"{path}, line {line}: {value!r:.80} is in column {number + 1}, which has no name in the header"
                )
        if delimiter == "|":  # Flickr30k's results.csv has a space after it
            fields = [field.strip() for field in fields]
        yield f"line {line}", {name: value for name, value in zip(header, fields, strict=True) if name}


def _csv_records(path: str) -> Iterator[tuple[int, list[str], str]]:
    """The header and the rows of a CSV: the number of the line where each begins, its fields (RFC 4180), and the delimiter."""
    lines, head, record = read_lines(path), list[str](), list[str]()
    for line in lines:
        head.append(line)
        if line.strip():
            break
    else:
        raise ValueError(f"{path} is empty: its first line should name the columns")
    delimiter = _delimiter(line, path)

    def remembered() -> Iterator[str]:
        for line in chain(head, lines):
            record.append(line)
            yield line

    reader = csv.reader(remembered(), delimiter=delimiter, strict=True, skipinitialspace=delimiter == "|")
    header: list[str] = []
    while True:
        begin = reader.line_num + 1
        record.clear()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(_open_quote(path, begin, record, error)) from error
        if fields is None:
            return
        if fields and not header:
            header = fields = _checked_header(fields, path)
        if fields:
            yield begin, fields, delimiter


def _delimiter(header: str, path: str) -> str:
    """The one that divides the header into the most fields."""
    header = header[: csv.field_size_limit()]  # no field of it is longer than the reader takes
    likely = "\t,;|" if path.lower().endswith((".tsv", ".tab")) else ",;\t|"
    return max(likely, key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter))))


def _checked_header(names: list[str], path: str) -> list[str]:
    names = [name.strip() for name in names]
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise ValueError(f"{path}, line 1: the column {twice[0]!r} is named twice")
    if not any(names):
        raise ValueError(f"{path}, line 1 names no columns")
    return names


def _open_quote(path: str, begin: int, record: list[str], error: csv.Error) -> str:
    """Says in which of a record's lines the quote opens that is at fault."""
    is_open, opened = False, begin
    for number, line in enumerate(record, begin):
        for _ in range(line.count('"')):
            is_open = not is_open
            opened = number if is_open else opened
    reason = "a quote opens that is never closed" if is_open else str(error)
    return f'{path}, line {opened}: {reason}; a quote within a quoted text is written twice: ""'


def _json_lines_rows(path: str, span: Span | None = None) -> Iterator[Placed]:
    for number, line in enumerate(read_lines(path, span), 1):
        if line.strip():
            place = line_name(number, span)
            yield place, _json_row(parse_json(line, f"{path}, {place}"), f"{path}, {place}")


def _json_content(path: str) -> Any:
    """What a JSON file holds; None if it is lines of JSON under that ending, which `datasets` reads too."""
    try:
        return parse_json("".join(read_lines(path)), path)
    except ValueError as error:
        if "Extra data: line 2" in str(error):
            return None
        raise


def _json_rows(path: str, split: str | None) -> Iterator[Placed]:
    content = _json_content(path)
    if content is None:
        yield from _json_lines_rows(path)
    elif is_coco(content):
        yield from coco_rows(content, path)
    elif is_karpathy(content):
        yield from karpathy_rows(content, path, split)
    else:
        if isinstance(content, dict) and content and all(isinstance(row, dict) for row in content.values()):
            content = list(content.values())  # number -> row
        if not isinstance(content, list):
            raise ValueError(
                f"{path} holds a {type(content).__name__} where a list of texts or of objects was expected, or COCO's images and annotations"
            )
        for number, row in enumerate(content, 1):
            yield f"row {number}", _json_row(row, f"{path}, row {number}")


def _json_row(row: Any, where: str) -> Row:
    if isinstance(row, str):
        return {"text": row}
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object or a text, found {type(row).__name__} {row!r:.80}")
    return row


def _text_rows(path: str, span: Span | None) -> Iterator[Placed]:
    for number, line in enumerate(read_lines(path, span), 1):
        if line.strip():
            yield line_name(number, span), {"text": line.rstrip("\r\n")}


def _parquet_file(path: str) -> pyarrow.parquet.ParquetFile:
    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no Parquet file, or was cut short: {error}") from error
    _check_names(file.schema_arrow, path)
    return file


def _check_names(schema: pyarrow.Schema, path: str) -> None:
    twice = [name for name in schema.names if schema.names.count(name) > 1]
    if twice:
        raise ValueError(f"{path} has two columns {twice[0]!r}")


def _arrow_file(path: str) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
    """The types and batches of an Arrow file, as a stream, which `datasets` writes, or with a footer."""
    try:
        file = pyarrow.memory_map(path)
        if file.read(6) == b"ARROW1":
            indexed = pyarrow.ipc.open_file(file)
            _check_names(indexed.schema, path)
            return indexed.schema, (indexed.get_batch(number) for number in range(indexed.num_record_batches))
        check_arrow_end(path)
        file.seek(0)
        stream = pyarrow.ipc.open_stream(file)
        _check_names(stream.schema, path)
        return stream.schema, iter(stream)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Arrow file, or was cut short: {error}") from error


def check_arrow_end(path: str | Path) -> None:
    """ValueError if the stream of an Arrow file does not end with its mark: readers would take what is there for the whole."""
    with open(path, "rb") as file:
        file.seek(-min(len(_ARROW_END), Path(path).stat().st_size), 2)
        if file.read() != _ARROW_END:
            raise ValueError(f"{path} has no end: it was cut short. Fetch or make it again")


def _arrow_schema(path: str, kind: str) -> pyarrow.Schema:
    """The columns' types, with texts as texts however they are stored."""
    schema = _parquet_file(path).schema_arrow if kind == "parquet" else _arrow_file(path)[0]
    for number, field in enumerate(schema):
        if pyarrow.types.is_dictionary(field.type):
            schema = schema.set(number, field.with_type(field.type.value_type))
    return schema


def _feature(schema: pyarrow.Schema, name: str) -> Any:
    """The type of a column; of those that `datasets` does not have (views, maps), that of whatever JSON holds."""
    column = pyarrow.schema([schema.field(name)], schema.metadata)
    try:
        return datasets.Features.from_arrow_schema(column)[name]
    except (ValueError, NotImplementedError):
        return datasets.Json()


def _parquet_batches(
    path: str, columns: list[str] | None, span: Span | None
) -> tuple[Iterator[pyarrow.RecordBatch], int]:
    """The batches of a Parquet file, or of those of its row groups that begin in a span, and how many rows come before."""
    file = _parquet_file(path)
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    numbers = [n for n, group in enumerate(groups) if span is None or span[0] <= _group_begin(group) < span[1]]
    types = [field.type for field in file.schema_arrow if columns is None or field.name in columns]
    # Texts are many to a batch; with photographs, a batch has some megabytes.
    batch_size = 4096 if all(map(pyarrow.types.is_string, types)) else 64
    batches = file.iter_batches(batch_size=batch_size, columns=columns, row_groups=numbers)
    return batches, sum(group.num_rows for group in groups[: numbers[0] if numbers else 0])


def _group_begin(group: pyarrow.parquet.RowGroupMetaData) -> int:
    """The first byte of a row group's first column."""
    first = group.column(0)
    return min(first.data_page_offset, first.dictionary_page_offset or first.data_page_offset)


def _batch_rows(path: str, batches: Iterator[pyarrow.RecordBatch], number: int = 0) -> Iterator[Placed]:
    """The rows of `batches`, behind `number` others."""
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged behind row {number}: {error}") from error
        if batch is None:
            return
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", row


# The kinds of tables, by the ending of the file.
KINDS: dict[str, tuple[str, ...]] = {
    "token": TOKEN_ENDINGS,
    "csv": (".csv", ".tsv", ".tab"),
    "json lines": (".jsonl", ".jsonlines", ".ndjson"),
    "json": (".json",),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "text": (".txt",),
}
