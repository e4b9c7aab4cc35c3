"""Batches of a stream for training: endless, collated in data workers, each process its own rows, and resumed without reading what is behind."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .captions import draw_captions
from .pair_rows import ENOUGH_ROWS, SkippedRows
from .pair_stream import PairStream, Position


class StreamLoader:
    """Endless batches of a [`PairStream`]: after an epoch the next one begins, within the same batch, so every process has as many batches as
    every other one, whatever their shards hold. A row of several captions shows one of them, drawn by seed, epoch and the row's content
    alone.

    A batch is made by one data worker, and workers take turns. With every batch comes how far its worker has read, which is all that
    resuming needs: `load_state_dict` goes on to the same batches.

    Args:
        stream: stream of this process, see [`PairStream.for_process`].
        batch_size: rows of a batch.
        collate: makes a batch of a list of rows, in the data worker.
        num_workers: data workers; 0: batches are made in this process.
        loader_options: of [`~torch.utils.data.DataLoader`]: `pin_memory`, `prefetch_factor`, `multiprocessing_context`.

    Raises:
        ValueError: While batches are read: if too many rows are broken, see [`PairSource`], or none is good.
    """

    def __init__(
        self,
        stream: PairStream,
        batch_size: int,
        collate: Callable[[list[dict[str, Any]]], Any],
        num_workers: int = 0,
        **loader_options: Any,
    ):
        self.stream, self.batch_size, self.collate = stream, batch_size, collate
        self.num_workers, self.loader_options = num_workers, loader_options
        self._positions = [Position()] * max(num_workers, 1)
        self._skipped = [SkippedRows() for _ in self._positions]
        self._next_worker = 0

    def __iter__(self) -> Iterator[Any]:
        batches = _WorkerBatches(self, list(self._positions), self._skipped, self._next_worker)
        # A generator of its own: else starting the loader would move the random state that a checkpoint has brought back.
        options = {**self.loader_options, "generator": torch.Generator().manual_seed(self.stream.seed)}
        loader = DataLoader(batches, batch_size=None, collate_fn=_as_it_is, num_workers=self.num_workers, **options)
        source = self.stream.source
        for batch, worker, position, skipped in loader:
            self._positions[worker], self._skipped[worker] = Position(*position), skipped
            self._next_worker = (worker + 1) % len(self._positions)
            self.skipped().check(self.stream.rows.name, source.max_broken_fraction, ENOUGH_ROWS)
            yield batch

    def skipped(self) -> SkippedRows:
        """Rows read and passed over for the batches so far, by this process; a row counts once every epoch."""
        return sum(self._skipped, SkippedRows())

    def state_dict(self) -> dict[str, Any]:
        """How far the batches have come, as JSON."""
        return {
            **self._readers(),
            "positions": [list(position) for position in self._positions],
            "skipped": [asdict(skipped) for skipped in self._skipped],
            "next_worker": self._next_worker,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on after the batch at which `state_dict` was called. ValueError if the stream, its seed or its readers are others: rows are
        dealt out to the readers (processes times data workers), so with another number of them, some would be read twice and others never.
        """
        for name, value in self._readers().items():
            if state[name] != value:
                raise ValueError(
                    f"the checkpoint's stream has {name} = {state[name]}, but now {name} = {value}: which rows are still to be read depends on it. "
                    f"Resume with {name} = {state[name]}, or train from the beginning"
                )
        self._positions = [Position(*position) for position in state["positions"]]
        self._skipped = [SkippedRows.from_dict(skipped) for skipped in state["skipped"]]
        self._next_worker = state["next_worker"]

    def _readers(self) -> dict[str, int]:
        return {
            "num_processes": self.stream.num_processes,
            "process_index": self.stream.process_index,
            "num_workers": self.num_workers,
            "batch_size": self.batch_size,
            "seed": self.stream.seed,
            "num_shards": self.stream.rows.table.num_shards,
            "shuffle_buffer_size": self.stream.source.shuffle_buffer_size,
        }


class _WorkerBatches(IterableDataset):
    """The batches of one data worker: `(batch, worker, position after it, rows it has read)`."""

    def __init__(self, loader: StreamLoader, positions: list[Position], skipped: list[SkippedRows], first_worker: int):
        self.stream, self.batch_size, self.collate = loader.stream, loader.batch_size, loader.collate
        self.positions, self.skipped, self.first_worker = positions, skipped, first_worker

    def __iter__(self) -> Iterator[tuple[Any, int, Position, SkippedRows]]:
        info, stream = get_worker_info(), self.stream
        # The loader asks its workers in turn, beginning with number 0, but it was the turn of `first_worker`.
        worker = ((0 if info is None else info.id) + self.first_worker) % len(self.positions)
        reader, num_readers = (n * len(self.positions) for n in (stream.process_index, stream.num_processes))
        position, skipped = self.positions[worker], self.skipped[worker] + SkippedRows()
        rows: list[dict[str, Any]] = []
        while True:
            start, good = position, False
            for row, key, after in stream.read_epoch(start, reader + worker, num_readers, skipped):
                position, good = after, True
                rows.append({**row, **draw_captions(row, key, stream.seed, position.epoch, key)})
                if len(rows) == self.batch_size:
                    yield self.collate(rows), worker, position, skipped + SkippedRows()
                    rows = []
            if not good and start == Position(start.epoch):
                raise ValueError(
                    f"{stream.rows.name}: reader {reader + worker} of {num_readers} (processes times data workers) gets no good row in "
                    f"an epoch ({skipped}): use fewer data workers"
                )
            position = Position(position.epoch + 1)


def _as_it_is(batch: Any) -> Any:
    return batch
