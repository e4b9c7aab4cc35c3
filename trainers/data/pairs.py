"""Pictures with captions from any layout that people have: webdataset shards, parquet, folders, tables of paths, the Hub."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from .pair_rows import PairRows, texts_of
from .pair_sources import open_rows
from .pair_stream import PairStream


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """
    Where pictures with captions are, and how to read them.

    Attributes:
        source: a folder, a file, a pattern of files (`shards/*.tar`) or the name of a dataset on the Hub. Of a folder or file are read:
            webdataset shards (.tar), .parquet, .jsonl, .json and .csv with paths of pictures (relative to the file), folders with pictures
            and a metadata.jsonl or metadata.csv (`imagefolder`), folders with a .txt beside each picture, and what
            `datasets` saved to disk.
        name: configuration of a dataset on the Hub.
        split: split of the dataset. A folder or file without splits is "train".
        revision: commit, tag or branch of a dataset on the Hub.
        data_files: files within a dataset on the Hub or a folder, as `datasets.load_dataset` takes them.
        image_column: column of the picture: a picture of `datasets`, its bytes or its path. A list of columns: the first one that a row
            has, such as `["jpg", "png", "webp"]` for webdataset shards.
        text_columns: column or columns of the captions, each a string or a list of strings; all of a row's captions together are what one is
            drawn from. A dot reaches into an object: "json.caption". Pictures with a .txt beside them have the columns "image" and "text".
        teacher_text_columns: column or columns of what the teacher of stage 1 reads in place of the captions, such as the English ones of
            which these are translations. A row that has nothing there is read by the teacher too.
        streaming: False: rows by number, copied once into `datasets`' cache. True: rows as they come, read anew every epoch, for what is too
            large to copy.
        shuffle_buffer_size: of a stream: rows that are shuffled together, and held in memory undecoded by every data worker. 1: the order of
            the files.
        max_broken_fraction: share of rows that may have a broken picture or no caption; more stops the reading with an error.

    Raises:
        ValueError: If a field has no sensible value; names it.
    """

    source: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | Sequence[str] | None = None
    image_column: str | Sequence[str] = "image"
    text_columns: str | Sequence[str] = "text"
    teacher_text_columns: str | Sequence[str] | None = None
    streaming: bool = False
    shuffle_buffer_size: int = 1000
    max_broken_fraction: float = 0.01

    def __post_init__(self):
        for name in ("image_column", "text_columns", "teacher_text_columns"):
            columns = self.columns(name)
            if (not columns and getattr(self, name) is not None) or not all(
                isinstance(column, str) and column for column in columns
            ):
                raise ValueError(f"{name} must be a column's name or a list of names, got {getattr(self, name)!r}")
        if self.shuffle_buffer_size < 1:
            raise ValueError(f"shuffle_buffer_size must be at least 1, got {self.shuffle_buffer_size}")
        if not 0 <= self.max_broken_fraction <= 1:
            raise ValueError(f"max_broken_fraction must be between 0 and 1, got {self.max_broken_fraction}")

    def columns(self, field: str) -> list[str]:
        """The columns of `field`, such as "text_columns", as a list; empty if it is None."""
        value = getattr(self, field)
        if value is None:
            return []
        return [value] if isinstance(value, str) else list(value)


def open_pairs(source: PairSource, seed: int = 0, *, images: bool = True) -> Dataset[dict[str, Any]]:
    """
    Opens `source` for training.

    Args:
        source: what to read.
        seed: of a stream's order, and of the rows that stand in for broken ones.
        images: False: rows have captions only, and no picture is decoded (stage 1 and stage 0 read texts alone).

    Returns:
        Rows `{"image": picture (PIL, RGB), "text": [captions]}`: a [`PairRows`], or a [`PairStream`] if `source.streaming`.

    Raises:
        FileNotFoundError: If there is nothing at that place, or no dataset of that name.
        ValueError: If a column or split is missing (lists those that are there) or the files are of no known layout. While rows are read: if more
            than `max_broken_fraction` of them are broken.
    """
    rows = open_rows(source, images=images)
    return (PairStream if source.streaming else PairRows)(rows, source, seed)


def iter_texts(source: PairSource, reader: str = "text") -> Iterator[str]:
    """
    All captions of `source`, or with `reader` "teacher_text" all that the teacher of stage 1 reads, in the order of its files, without decoding or (where the format allows it) reading pictures. Rows without a
    caption are passed over.

    Raises:
        FileNotFoundError, ValueError: As [`open_pairs`].
    """
    rows = open_rows(source, images=False, streaming=True)
    for row in rows.table:
        yield from texts_of(row, rows, reader)


__all__ = ["PairRows", "PairSource", "PairStream", "iter_texts", "open_pairs"]
