"""Texts to embed, read as a stream from whatever `train` reads its captions from, as a whole or in parts."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from .pair_rows import ENOUGH_ROWS, good_texts
from .pair_source import PairSource
from .pair_sources import check_captions, read_found
from .parts import Division
from .sources import FoundRows, find_rows
from .tables import kind_of


class TextSource:
    """The texts of one source. Every iteration reads it anew, and no more of it than is asked for.

    `operator.length_hint` gives the number of rows where the source tells it cheaply, which is what a progress bar needs.

    Args:
        name: name of the source, for messages.
        texts: gives the texts anew at every call.
        num_rows: if it is known.
    """

    def __init__(self, name: str, texts: Callable[[], Iterator[str]], num_rows: int | None = None):
        self.name = name
        self._texts = texts
        self._num_rows = num_rows

    def __length_hint__(self) -> int:
        return self._num_rows if self._num_rows is not None else NotImplemented

    def __iter__(self) -> Iterator[str]:
        empty = True
        for text in self._texts():
            empty = False
            yield text
        if empty:
            raise ValueError(f"{self.name} holds no texts")


class TextParts:
    """The texts of one source in parts, each of which is read without the others, see [`Division`]. Can be pickled.

    Args:
        found: the rows.
        source: what they were found from, with the column of the texts.
        streaming: whether rows are read as they come, or by number.
    """

    def __init__(self, found: FoundRows, source: PairSource, streaming: bool):
        self.name = found.name
        self._division, self._source, self._streaming = Division(found), source, streaming

    def __iter__(self) -> Iterator[str]:
        return self.part(0, 1)

    def identity(self) -> dict[str, Any]:
        """What tells these texts from others without reading them, as JSON."""
        return {**self._division.identity(), "column": self._source.text_columns, "split": self._source.split}

    def most_parts(self) -> int | None:
        """How many parts have texts at most, where the files cannot be cut; else None."""
        return self._division.most_parts()

    def part(self, index: int, count: int) -> Iterator[str]:
        """The texts of part `index` of `count`. Raises what [`read_texts`] raises; of broken rows, a part of fewer than 1,000 rows may have as many as
        one of 1,000.
        """
        found = self._division.part(index, count)
        if found is not None and found.columns():  # files of lines may all be empty
            rows = read_found(found, self._source, images=False, streaming=self._streaming)
            yield from good_texts(rows, self._source, at_least=ENOUGH_ROWS)


def read_texts(source: str | Path, column: str | None = None, split: str = "train") -> TextSource:
    """Opens a source of texts.

    Args:
        source: anything that [`open_pairs`] reads: a file with one text a line (.txt), tables, captions files, shards, folders, patterns of files,
            datasets on the Hub. Files are read as UTF-8.
        column: the column that holds a text, or a list of texts, in every row; "json.caption" reaches into an object. By default "text" or
            else "caption". Lines and JSON rows that are texts themselves have the column "text".

    Raises:
        FileNotFoundError, ValueError: As [`open_pairs`], and while texts are read if a row holds something else than text, or there are none.
    """
    found, place, streaming = _find(source, column, split)
    rows = read_found(found, place, images=False, streaming=streaming)
    return TextSource(str(source), lambda: good_texts(rows, place), _num_rows(found))


def divide_texts(source: str | Path, column: str | None = None, split: str = "train") -> TextParts:
    """Opens a source of texts to be read in parts. Arguments and errors are those of [`read_texts`], but a file is opened only when a part that has it is
    read: for the column by default, the first one decides.
    """
    return TextParts(*_find(source, column, split))


def _find(source: str | Path, column: str | None, split: str) -> tuple[FoundRows, PairSource, bool]:
    """The rows, what they are read by, and whether they are streamed."""
    place = PairSource(source=str(source), split=split)
    saved = any((Path(source) / file).exists() for file in ("dataset_dict.json", "state.json"))  # by `save_to_disk`
    found = find_rows(place, streaming=not saved)
    is_text = bool(found.shards) and kind_of(found.shards[0].path) == "text"
    if column not in (None, "text") and is_text and found.shards[0].columns() == ["text"]:
        raise ValueError(f"{source} has no columns: leave --column out")
    place = replace(place, text_columns=column or _default_column(found))
    return found, place, not saved


def _default_column(found: FoundRows) -> str:
    columns = next(filter(None, (shard.columns() for shard in found.shards)), None) or found.columns()
    if not columns:
        raise ValueError(f"{found.name} holds no texts")
    check_captions(found, columns)
    default = next((name for name in ("text", "caption") if name in columns), None)
    if default is None:
        raise ValueError(
            f"{found.name}: name the column of the texts with --column; the columns are {', '.join(columns) or 'none'}"
        )
    return default


def _num_rows(found: FoundRows) -> int | None:
    if isinstance(found.table, datasets.Dataset):
        return len(found.table)
    counts = [shard.num_rows() for shard in found.shards]
    return sum(count for count in counts if count is not None) if counts and None not in counts else None
