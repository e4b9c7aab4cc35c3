"""Batches of a whole stream in the order of its files, each process its own part of every batch: what a model is evaluated on."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from modeling_proclip.images import BrokenImage

from .pair_rows import ENOUGH_ROWS, BrokenRow, SkippedRows, read_row, row_name
from .pair_stream import PairStream


# Key of a batch: how many of its rows count, `()` int64; the others fill it up, see [`EvaluationBatches`].
REAL_ROWS = "real_rows"


class EvaluationBatches(IterableDataset):
    """The batches of one process. `num_processes * batch_size` consecutive rows make a joined batch, of which each process takes `batch_size`, as it does
    of rows read by number. Every process and data worker reads all rows, and decodes its own only.

    Broken rows are skipped, which makes their batch smaller, whatever the number of processes. A process without a good row in a joined
    batch gets one of another's that does not count: all processes have as many batches.

    Args:
        stream: the stream of this process, see [`PairStream.for_process`].
        batch_size: rows of a batch.
        collate: makes a batch, a dictionary of tensors, of a list of rows.

    Raises:
        ValueError: While batches are read: if too many rows are broken, see [`PairSource`], or none is good.
    """

    def __init__(self, stream: PairStream, batch_size: int, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.stream, self.batch_size, self.collate = stream, batch_size, collate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info, stream, size = get_worker_info(), self.stream, self.batch_size
        # The loader asks its workers in turn.
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        rows, skipped, first = enumerate(stream.in_order()), SkippedRows(), stream.process_index * size
        for number, joined in enumerate(iter(lambda: list(islice(rows, stream.num_processes * size)), [])):
            if number % num_workers == worker:
                good = list(self._read(joined[first : first + size], skipped))
                skipped.check(stream.rows.name, stream.source.max_broken_fraction, ENOUGH_ROWS)
                batch = self.collate(good or [self._filler(joined)])
                yield {**batch, REAL_ROWS: torch.tensor(len(good))}

    def _read(self, rows: Iterable[tuple[int, dict[str, Any]]], skipped: SkippedRows) -> Iterator[dict[str, Any]]:
        """The good ones of undecoded rows, each with its number."""
        for number, raw in rows:
            skipped.rows += 1
            try:
                yield read_row(raw, self.stream.rows)
            except (BrokenRow, BrokenImage) as error:
                skipped.note(row_name(raw, self.stream.rows, number), error)

    def _filler(self, joined: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        for row in self._read(chain(joined, enumerate(self.stream.in_order())), SkippedRows()):
            return row
        raise ValueError(f"{self.stream.rows.name} holds no good row to evaluate on")
