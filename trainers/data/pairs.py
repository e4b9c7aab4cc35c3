"""Images with captions from any layout that people have: webdataset shards, parquet, folders, tables of paths, the Hub."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset

from .pair_rows import PairRows, good_texts
from .pair_source import PairSource
from .pair_sources import open_rows
from .pair_stream import PairStream


def open_pairs(source: PairSource, seed: int = 0, *, images: bool = True) -> Dataset[dict[str, Any]]:
    """Opens `source` for training.

    Args:
        source: what to read.
        seed: seed of a stream's order, and of the rows that stand in for broken ones.
        images: False: rows have captions only, and no image is decoded (stage 1 and stage 0 read texts alone).

    Returns:
        Rows `{"image": image (PIL, RGB), "text": [captions]}`: a [`PairRows`], or a [`PairStream`] if `source.streaming`.

    Raises:
        FileNotFoundError: If there is nothing at that place, or no dataset of that name.
        ValueError: If a column or split is missing (lists those that are there) or the files are of no known layout. While rows are read: if more
            than `max_broken_fraction` of them are broken.
    """
    rows = open_rows(source, images=images)
    return (PairStream if source.streaming else PairRows)(rows, source, seed)


def iter_texts(source: PairSource, reader: str = "text") -> Iterator[str]:
    """All captions of `source`, or with `reader` "teacher_text" all that the teacher of stage 1 reads, in the order of its files, without decoding or
    (where the format allows it) reading images. Rows without a caption are passed over.

    Raises:
        FileNotFoundError, ValueError: As [`open_pairs`].
    """
    return good_texts(open_rows(source, images=False, streaming=True), source, reader)


__all__ = ["PairRows", "PairSource", "PairStream", "iter_texts", "open_pairs"]
