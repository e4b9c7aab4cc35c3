"""Texts to embed, read as a stream from a file, a dataset on disk or a dataset on the Hub."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")

# Rows of a source: their number, counted from 1, and the value of the chosen column.
_Rows = Iterator[tuple[int, Any]]


class TextSource:
    """The texts of one source. Every iteration reads it anew, and no more of it than is asked for.

    `operator.length_hint` gives the number of rows where the source tells it cheaply, which is what a progress bar needs.

    Args:
        name: of the source, for messages.
        rows: gives the rows anew at every call. A value is a text or a list of texts (several captions of one picture).
        num_rows: if it is known.
    """

    def __init__(self, name: str, rows: Callable[[], _Rows], num_rows: int | None = None):
        self.name = name
        self._rows = rows
        self._num_rows = num_rows

    def __length_hint__(self) -> int:
        return self._num_rows if self._num_rows is not None else NotImplemented

    def __iter__(self) -> Iterator[str]:
        empty = True
        for number, value in self._rows():
            texts = value if isinstance(value, list) else [value]
            for text in texts:
                if not isinstance(text, str):
                    raise ValueError(
                        f"{self.name}, row {number}: expected text, found {type(text).__name__} {text!r:.80}"
                    )
                empty = False
                yield text
        if empty:
            raise ValueError(f"{self.name} holds no texts")


def read_texts(source: str | Path, column: str | None = None, split: str = "train") -> TextSource:
    """Opens a source of texts.

    Args:
        source: a .txt file (one text a line; blank lines are skipped), a .jsonl, .json (a list), .csv or .parquet file, or anything else
            that [`open_pairs`] reads: folders, patterns of files, datasets on the Hub. Files are read as UTF-8.
        column: the column that holds a text, or a list of texts, in every row. Not for .txt, nor for JSON rows that are texts themselves.
            Of folders, patterns and datasets "text" by default; "json.caption" reaches into an object.
        split: of a dataset; ignored for a file.

    Raises:
        FileNotFoundError: If there is no such file, nor a dataset of that name.
        ValueError: If the column is missing (names those that are there), or the file is of another kind or damaged. While the texts are
            read: if a row holds no text (names the row), or if there are none at all.
    """
    path = Path(source)
    is_pattern = any(character in str(source) for character in "*?[") and not path.exists()
    if path.is_dir() or is_pattern or path.suffix == ".tar" or _may_be_on_the_hub(path):
        return _dataset(str(source), column, split)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is of an unknown kind: texts are read from {', '.join(SUFFIXES)} files")
    if path.suffix == ".txt" and column is not None:
        raise ValueError(f"{path} has no columns: leave --column out")
    if path.suffix == ".parquet":
        return _parquet(path, column)
    rows = {".txt": _text_rows, ".jsonl": _json_lines_rows, ".json": _json_rows, ".csv": _csv_rows}[path.suffix]
    num_rows = _count_lines(path) if path.suffix in (".txt", ".jsonl") else None

    def read() -> _Rows:
        try:
            yield from rows(path, column)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not encoded as UTF-8: {error}") from error

    return TextSource(str(path), read, num_rows)


def _may_be_on_the_hub(path: Path) -> bool:
    return not path.exists() and path.suffix not in SUFFIXES and not path.is_absolute()


def _text_rows(path: Path, column: str | None) -> _Rows:
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line.rstrip("\n")


def _json_lines_rows(path: Path, column: str | None) -> _Rows:
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, row {number} is no JSON: {error}") from error
                yield number, _value(row, column, f"{path}, row {number}")


def _json_rows(path: Path, column: str | None) -> _Rows:
    with open(path, encoding="utf-8-sig") as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__} where a list of texts or of objects was expected")
    for number, row in enumerate(rows, 1):
        yield number, _value(row, column, f"{path}, row {number}")


def _csv_rows(path: Path, column: str | None) -> _Rows:
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            rows = csv.DictReader(file)
            _check_column(column, rows.fieldnames or [], str(path))
            for number, row in enumerate(rows, 1):
                yield number, row[column]
        except csv.Error as error:
            raise ValueError(f"{path} is no CSV: {error}") from error


def _parquet(path: Path, column: str | None) -> TextSource:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error
    _check_column(column, file.schema_arrow.names, str(path))

    def read() -> _Rows:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=4096, columns=[column]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield number, value

    return TextSource(str(path), read, file.metadata.num_rows)


def _dataset(name: str, column: str | None, split: str) -> TextSource:
    """The captions of whatever [`open_pairs`] reads; rows without one are passed over."""
    import datasets

    from .pair_rows import texts_of
    from .pair_sources import open_rows
    from .pairs import PairSource

    saved = any((Path(name) / file).exists() for file in ("dataset_dict.json", "state.json"))  # by `save_to_disk`
    source = PairSource(source=name, split=split, text_columns="text" if column is None else column)
    rows = open_rows(source, images=False, streaming=not saved)

    def read() -> _Rows:
        for number, row in enumerate(rows.table, 1):
            yield number, texts_of(row, rows)

    return TextSource(name, read, len(rows.table) if isinstance(rows.table, datasets.Dataset) else None)


def _value(row: Any, column: str | None, where: str) -> Any:
    if isinstance(row, dict):
        _check_column(column, row, where)
        return row[column]
    if column is not None:
        raise ValueError(
            f"{where}: expected an object with the column {column!r}, found {type(row).__name__} {row!r:.80}"
        )
    return row


def _check_column(column: str | None, columns: Any, where: str) -> None:
    if column not in columns:
        wanted = "name the column of the texts with --column" if column is None else f"there is no column {column!r}"
        raise ValueError(f"{where}: {wanted}; the columns are {', '.join(columns) or 'none'}")


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
