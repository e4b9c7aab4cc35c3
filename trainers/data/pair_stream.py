"""A stream of images with captions: every row once an epoch over all processes and data workers, shuffled by seed, and resumable anywhere."""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from modeling_proclip.images import BrokenImage

from .pair_rows import ENOUGH_ROWS, BrokenRow, SkippedRows, good_texts, read_row, row_key, row_name
from .pair_source import PairSource
from .pair_sources import RawRows


_READ_AHEAD = 16  # rows that `datasets` hands over at a time


class Position(NamedTuple):
    """How far a reader of a stream has come: all that is needed to go on from there.

    Attributes:
        part: of the parts of shards that it reads in this epoch, the one in which the block of rows begins that it is giving out.
        row: of that part's shard, the row with which the block begins.
        given: rows of the shuffled block that were given out or passed over.
    """

    epoch: int = 0
    part: int = 0
    row: int = 0
    given: int = 0


class Part(NamedTuple):
    """Those rows of a shard whose number leaves the remainder `offset` on division by `step`."""

    shard: int
    offset: int
    step: int


class StreamedRow(NamedTuple):
    """A row `{"image", "text"}` of a stream, what tells it from others (see [`row_key`]), and the position with which a reader goes on after it."""

    row: dict[str, Any]
    key: str
    position: Position


def parts_of_reader(num_shards: int, reader: int, num_readers: int, seed: int, epoch: int) -> list[Part]:
    """What one of several readers reads in an epoch. Over all readers, that is every row once.

    The shards are put in an order drawn by seed and epoch and dealt out whole. Those that are left over, fewer than readers, are shared: each
    is read by several readers, which take its rows in turn. So readers have the same share, to one shard, and none reads much that it
    does not need.
    """
    order = random.Random(f"{seed} {epoch}").sample(range(num_shards), num_shards)
    whole = num_shards // num_readers * num_readers
    parts = [Part(shard, 0, 1) for shard in order[reader:whole:num_readers]]
    left_over = order[whole:]
    if left_over:
        shared = reader % len(left_over)
        sharers = range(shared, num_readers, len(left_over))
        parts.append(Part(left_over[shared], sharers.index(reader), len(sharers)))
    return parts


class PairStream(IterableDataset):
    """Rows `{"image": image (PIL, RGB), "text": [captions]}` as they come; `{"text": [captions]}` where images are not read.

    One iteration is one epoch of one process, split over the DataLoader's workers if there are any. Shards (files) are shuffled by seed and
    epoch and dealt out to the readers (processes times workers). Each reader gathers `shuffle_buffer_size` rows, undecoded, shuffles these, gives
    them out and gathers the next ones, so that a place in the stream is told by four numbers, and going on from it reads no more than the
    rest of a shard again. Which rows a reader gets depends on the number of readers; which rows an epoch has does not.

    Broken rows are passed over, counted and bounded, see [`PairSource`].

    Args:
        rows: the opened source, a stream of `datasets`.
        source: what `rows` was opened from.
        seed: seed of the order.
        process_index, num_processes: which of the processes that share the rows this one is.

    Attributes:
        epoch: epoch of the next iteration, set by `set_epoch`.
    """

    def __init__(
        self, rows: RawRows, source: PairSource, seed: int, *, process_index: int = 0, num_processes: int = 1
    ):
        self.rows, self.source, self.seed, self.epoch = rows, source, seed, 0
        self.process_index, self.num_processes = process_index, num_processes

    def for_process(self, process_index: int, num_processes: int) -> "PairStream":
        """The same stream, for one of `num_processes` that share it."""
        return PairStream(self.rows, self.source, self.seed, process_index=process_index, num_processes=num_processes)

    def first_caption(self, reader: str = "text") -> str:
        """A caption of the first row that has one, as [`texts_of`] gives them, without decoding its image. ValueError if none has."""
        for text in good_texts(self.rows, self.source, reader):
            return text
        raise ValueError(f"{self.rows.name} holds no captions")

    def in_order(self) -> Iterator[dict[str, Any]]:
        """All rows of the stream, undecoded, in the order of its files. In a data worker too: all."""
        parts = [Part(shard, 0, 1) for shard in range(self.rows.table.num_shards)]
        return (row for row, _, _ in self._raw_rows(parts, 0, 0))

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that epoch: another order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        reader, readers = self.process_index * workers + index, self.num_processes * workers
        skipped = SkippedRows()
        for streamed in self.read_epoch(Position(self.epoch), reader, readers, skipped):
            yield streamed.row
        if readers == 1:  # else this reader's rows may be too few to judge by
            skipped.check(self.rows.name, self.source.max_broken_fraction)

    def read_epoch(
        self, position: Position, reader: int, num_readers: int, skipped: SkippedRows
    ) -> Iterator[StreamedRow]:
        """The rest of an epoch, from `position` on (`Position(epoch)` for a whole one), for one of the `num_readers` readers of all processes. `skipped` counts
        the rows that are read and those that are broken. ValueError if more are broken than the source bears, or a shard cannot be read.
        """
        rows, size = self.rows, self.source.shuffle_buffer_size
        parts = parts_of_reader(rows.table.num_shards, reader, num_readers, self.seed, position.epoch)
        raw_rows = self._raw_rows(parts, position.part, position.row)
        block: list[tuple[dict[str, Any], int, int]]
        while block := list(islice(raw_rows, size)):
            _, part, row = block[-1]
            order = random.Random(f"{self.seed} {reader} {position.epoch} {position.part} {position.row}")
            shuffled = order.sample(range(len(block)), len(block))
            for given in range(position.given, len(block)):
                raw, _, end = block[shuffled[given]]
                skipped.rows += 1
                try:
                    read = read_row(raw, rows)
                except (BrokenRow, BrokenImage) as error:
                    skipped.note(row_name(raw, rows, end - 1), error)
                    skipped.check(rows.name, self.source.max_broken_fraction, ENOUGH_ROWS)
                else:
                    yield StreamedRow(read, row_key(raw, rows), position._replace(given=given + 1))
            position = Position(position.epoch, part, row)

    def _raw_rows(self, parts: list[Part], first: int, row: int) -> Iterator[tuple[dict[str, Any], int, int]]:
        """Undecoded rows from row number `row` of part `first` on; with each the part and row number at which what follows it begins."""
        table = self.rows.table
        for number, part in enumerate(parts[first:], first):
            shard = table.shard(table.num_shards, part.shard)
            # `iter`, because iterating in a data worker `datasets` would divide the shard among the workers once more.
            batches = (shard.skip(row) if row else shard).iter(batch_size=_READ_AHEAD)
            while (batch := self._next(batches, part.shard)) is not None:
                names = list(batch)
                for values in zip(*batch.values(), strict=True):
                    if row % part.step == part.offset:
                        yield dict(zip(names, values, strict=True)), number, row + 1
                    row += 1
            row = 0

    def _next(self, batches: Iterator[dict[str, list[Any]]], shard: int) -> dict[str, list[Any]] | None:
        try:
            return next(batches, None)
        except Exception as error:
            if self.rows.shards:
                raise  # what is read here names its file itself
            raise ValueError(
                f"shard {shard} of {self.rows.name} cannot be read to its end: {type(error).__name__}: {error}. Replace it or leave it out"
            ) from error
