"""Rows of images with captions by number; what a broken row is, and how many of them are borne."""

import hashlib
import logging
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset

from modeling_proclip.images import BrokenImage

from .archives import BROKEN
from .copies import PLACE
from .folders import read_beside
from .images import decode_stored_image
from .pair_source import PairSource
from .pair_sources import NAMES, RawRows
from .tables import value_at


logger = logging.getLogger(__name__)

ENOUGH_ROWS = 1000  # before so many rows are read, one broken row says little about their share
_NAMED = 3  # broken rows that messages name
_STAND_INS = 1000  # tried for one broken row


class BrokenRow(ValueError):
    """A row without a caption, or with one that cannot be read."""


@dataclass
class SkippedRows:
    """How many rows were read, broken ones included; how many of them have a broken image or no caption; and the first of these, named with the reason."""

    rows: int = 0
    broken_images: int = 0
    without_caption: int = 0
    examples: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SkippedRows":
        """What `asdict` made of it, by this release or an earlier one."""
        return cls(**{"broken_images" if name == "broken_pictures" else name: value for name, value in values.items()})

    @property
    def skipped(self) -> int:
        """Rows that could not be used."""
        return self.broken_images + self.without_caption

    def note(self, name: str, error: Exception) -> None:
        """Counts the broken row `name`, and warns of the first ones."""
        if isinstance(error, BrokenImage):
            self.broken_images += 1
        else:
            self.without_caption += 1
        if len(self.examples) < _NAMED:
            self.examples.append(f"{name}: {error}")
            logger.warning("passed over %s: %s", name, error)

    def check(self, source: str, most: float, at_least: int = 0) -> None:
        """ValueError if more than the share `most` of the rows read is broken, where fewer than `at_least` count as `at_least`."""
        if self.skipped > most * max(self.rows, at_least):
            raise ValueError(
                f"{source}: {self}, more than max_broken_fraction = {most:g} allows. The first: {'; '.join(self.examples)}. "
                "Repair or leave out these rows, or raise max_broken_fraction"
            )

    def __add__(self, other: "SkippedRows") -> "SkippedRows":
        return SkippedRows(
            self.rows + other.rows,
            self.broken_images + other.broken_images,
            self.without_caption + other.without_caption,
            (self.examples + other.examples)[:_NAMED],
        )

    def __str__(self) -> str:
        return (
            f"{self.broken_images:,} broken images and {self.without_caption:,} rows without a caption among "
            f"{self.rows:,} rows"
        )


def texts_of(row: Mapping[str, Any], rows: RawRows, reader: str = "text") -> list[str]:
    """The captions of an undecoded row for `reader`, as they are written; those of white space only are left out. "teacher_text" is what the teacher of
    stage 1 reads: in a row without one that is its captions.

    Raises:
        BrokenRow: If they cannot be read; says why.
        ValueError: If a column holds something that is neither text nor a list of texts; names the row and column.
    """
    if row.get(BROKEN) is not None:
        raise BrokenRow(row[BROKEN])
    texts: list[str] = []
    for column in rows.text_columns if reader == "text" else rows.teacher_text_columns:
        head = column.partition(".")[0]
        if head in rows.text_files and row.get(head) is not None:
            try:
                value = value_at({head: read_beside(str(rows.files.find(row[head])))}, column)
            except (OSError, ValueError) as error:
                raise BrokenRow(str(error)) from error
        else:
            value = value_at(row, column)
        for text in value if isinstance(value, list) else [value]:
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"{row_name(row, rows)}: column {column!r} holds the {type(text).__name__} {text!r:.80}, where a text was expected"
                )
            if text and not text.isspace():
                texts.append(text)
    return texts if texts or reader == "text" else texts_of(row, rows)


def good_texts(rows: RawRows, source: PairSource, reader: str = "text", *, at_least: int = 0) -> Iterator[str]:
    """All captions of `rows` for `reader`, see [`texts_of`], as they come. Rows without a caption are passed over and counted; ValueError if they are
    more than the source allows, where fewer rows than `at_least` count as `at_least`.
    """
    skipped = SkippedRows()
    for number, row in enumerate(rows.table):
        skipped.rows += 1
        try:
            texts = texts_of(row, rows, reader)
            if not texts:
                raise BrokenRow("it has no caption")
        except BrokenRow as error:
            skipped.note(row_name(row, rows, number), error)
            skipped.check(rows.name, source.max_broken_fraction, ENOUGH_ROWS)
            continue
        yield from texts
    skipped.check(rows.name, source.max_broken_fraction, at_least)


def read_row(row: Mapping[str, Any], rows: RawRows) -> dict[str, Any]:
    """`{"image": image, "text": [captions]}` of an undecoded row, without "image" where images are not read, and with "teacher_text" where the source has
    `teacher_text_columns`. BrokenRow if it has no caption, BrokenImage if its image cannot be decoded.
    """
    texts = texts_of(row, rows)
    if not texts:
        raise BrokenRow("it has no caption")
    captions = {"text": texts}
    if rows.teacher_text_columns:
        captions["teacher_text"] = texts_of(row, rows, "teacher_text")
    if not rows.image_columns:
        return captions
    return {"image": decode_stored_image(_undecoded(row, rows), rows.files), **captions}


def row_key(row: Mapping[str, Any], rows: RawRows) -> str:
    """What tells an undecoded row from others, wherever in a stream it comes: a hash of its captions and of its image's bytes or file name."""
    image = _undecoded(row, rows) if rows.image_columns else None
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        image = os.path.basename(image).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b("\n".join(texts_of(row, rows)).encode("utf-8", "surrogatepass"), digest_size=16)
    digest.update(image if isinstance(image, bytes) else b"")
    return digest.hexdigest()


def row_name(row: Mapping[str, Any], rows: RawRows, number: int | None = None) -> str:
    """What messages call an undecoded row: its place in its file, its key and shard, the path of its image, or its number, counted from 0."""
    if PLACE in row:
        return row[PLACE]
    if all(name in row for name in NAMES):
        return f"{row['__key__']} of {row['__url__']}"
    image = _undecoded(row, rows) if rows.image_columns else None
    path = image.get("path") if isinstance(image, Mapping) else image
    if isinstance(path, str) and path:
        return path
    return rows.name if number is None else f"row {number} of {rows.name}"


def _undecoded(row: Mapping[str, Any], rows: RawRows) -> Any:
    """The image in the first column that has one."""
    return next((row[column] for column in rows.image_columns if row.get(column) is not None), None)


class PairRows(Dataset):
    """Rows `{"image": image (PIL, RGB), "text": [captions]}` by number; `{"text": [captions]}` where images are not read.

    A broken row must not shift the batches that come after it, so another one stands in for it: the row whose number is drawn by seed, the
    broken row's number and attempt alone, whatever was read before.

    Args:
        rows: the opened source.
        source: what `rows` was opened from.
        seed: seed of the rows that stand in.

    Raises:
        ValueError: When rows are read: if too many are broken, see [`PairSource`].
    """

    def __init__(self, rows: RawRows, source: PairSource, seed: int):
        self.rows, self.source, self.seed = rows, source, seed
        # What is known of each row, in memory shared with data workers, each row in a byte of its own: 0 unread, 1 good, 2 broken image,
        # 3 no caption.
        self._known = torch.zeros(len(rows.table), dtype=torch.uint8).share_memory_()
        self._examples: list[str] = []

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = range(len(self))[index]
        stand_ins = random.Random(f"{self.seed} {number}")
        for _ in range(_STAND_INS):
            if self._known[number] <= 1:  # what is broken is not read again: an image may be at an address
                raw = self.rows.table[number]
                try:
                    row = read_row(raw, self.rows)
                except (BrokenRow, BrokenImage) as error:
                    self._note(row_name(raw, self.rows, number), number, error)
                else:
                    self._known[number] = 1
                    return row
            number = stand_ins.randrange(len(self))
        skipped = self.skipped()
        raise ValueError(
            f"{self.rows.name}: {_STAND_INS} rows in turn are broken: {skipped}. The first: {'; '.join(skipped.examples)}"
        )

    def captions(self, reader: str = "text") -> Iterator[list[str]]:
        """The captions of every row for `reader`, see [`texts_of`], without decoding an image; none of broken rows."""
        for row in self.rows.texts_table():
            try:
                yield texts_of(row, self.rows, reader)
            except BrokenRow:
                yield []

    def skipped(self) -> SkippedRows:
        """What was read so far, by this process and its data workers."""
        counts = torch.bincount(self._known, minlength=4).tolist()
        return SkippedRows(sum(counts[1:]), counts[2], counts[3], self._examples)

    def _note(self, name: str, number: int, error: Exception) -> None:
        known_before = bool(self._known[number] > 1)
        self._known[number] = 2 if isinstance(error, BrokenImage) else 3
        if not known_before:
            counted = SkippedRows(examples=self._examples)
            counted.note(name, error)  # names it
            self.skipped().check(self.rows.name, self.source.max_broken_fraction, min(len(self), ENOUGH_ROWS))
