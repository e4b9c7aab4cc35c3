"""Fills a text store: reads texts, leaves out what is there, embeds the rest shard by shard. Several processes can do it at the same time."""

import errno
import logging
import operator
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainers.compute.ahead import one_ahead
from trainers.display.progress import Progress

from .encoding import EncodedBatch, encode_texts, shorten
from .fingerprint import check_same_encoder
from .keys import find_keys, sort_order, text_keys
from .layout import FORMAT_VERSION, Writer, read_settings


logger = logging.getLogger(__name__)

_CHUNK = 4096  # texts hashed and compared with the store at a time
_SAMPLE = 64  # texts from which the time is estimated
_WORTH_ESTIMATING = 10_000  # texts


@dataclass
class BuildSummary:
    """What one call of [`TextEmbeddingStore.build`] did.

    Attributes:
        num_texts: texts that it read, those of other processes left out.
        num_new: texts that it embedded and stored.
        num_stored, num_repeated: texts that the store had already, and that had come earlier in the same call.
        num_truncated: texts among the new ones that were longer than the model reads.
        num_tasks: tasks that it did, see `num_tasks` there.
    """

    num_texts: int = 0
    num_new: int = 0
    num_stored: int = 0
    num_repeated: int = 0
    num_truncated: int = 0
    num_tasks: int = 0
    seconds: float = 0.0

    def __add__(self, other: "BuildSummary") -> "BuildSummary":
        return BuildSummary(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Share:
    """Those texts that process `index` of `count` embeds, by their hashes: equal texts belong to the same process, wherever they stand."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"process_index must be at least 0 and less than num_processes, got {self.index} of {self.count}"
            )

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Which of `keys (n, 2)` are of this share: `(n,)` bool."""
        return keys[:, 0].view(np.uint64) % np.uint64(self.count) == self.index


class KeySet:
    """A set of keys that grows by arrays, at 16 bytes a key: 100 million texts take 1.6 GB over all processes that share them. A Python set would
    need 10 GB.

    Sorted runs are merged when the last is no longer than the one that comes after it, so there are at most log2(n) of them.
    """

    def __init__(self):
        self._runs: list[np.ndarray] = []  # each (2, n), sorted

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Which of `keys (n, 2)` are in the set: `(n,)` bool."""
        known = np.zeros(len(keys), dtype=bool)
        for run in self._runs:
            known |= find_keys(run, keys) >= 0
        return known

    def add(self, keys: np.ndarray) -> None:
        """Adds `keys (n, 2)`, none of which is in the set yet."""
        while self._runs and self._runs[-1].shape[1] <= len(keys):
            keys = np.concatenate([keys, self._runs.pop().T])
        self._runs.append(np.ascontiguousarray(keys[sort_order(keys)].T))


def build_store(
    writer: Writer,
    texts: Iterable[str],
    model: torch.nn.Module,
    processor: Any,
    fingerprint: dict[str, Any],
    is_stored: Callable[[np.ndarray], np.ndarray],
    num_stored: int,
    *,
    share: Share,
    token_budget: int | None,
    shard_size: int,
    dtype: str,
    progress: bool,
    title: str = "embedding texts",
) -> BuildSummary:
    """Embeds those `texts` of a share that are not stored yet, and writes them as shards.

    Args:
        writer: writer of the store, which is locked.
        texts, model, processor, token_budget, shard_size, dtype, progress: of [`TextEmbeddingStore.build`].
        fingerprint: fingerprint of the encoder.
        is_stored: which of keys `(n, 2)` the store has: `(n,)` bool.
        num_stored: texts that the store has.
        share: which of the texts are embedded here.
        title: of the progress.
    """
    summary, started = BuildSummary(), time.perf_counter()
    settings = read_settings(writer.path)
    num_texts = operator.length_hint(texts, 0)
    texts = iter(texts)
    first = list(islice(texts, 1))
    with Progress(title, num_texts // share.count or None, "texts", shown=progress) as bar:
        fresh = _fresh_texts(chain(first, texts), share, is_stored, summary, bar)

        def windows() -> Iterator[tuple[tuple[str, ...], tuple[np.ndarray, ...], Iterator[EncodedBatch]]]:
            while window := list(islice(fresh, shard_size)):
                window_texts, keys = zip(*window, strict=True)
                yield window_texts, keys, encode_texts(window_texts, model, processor, token_budget=token_budget)

        for window_texts, keys, batches in one_ahead(windows()):
            if not summary.num_new and num_texts >= _WORTH_ESTIMATING:
                sample = window_texts[:: max(len(window_texts) // _SAMPLE, 1)][:_SAMPLE]
                encode = lambda some: encode_texts(some, model, processor, token_budget=token_budget)  # noqa: E731
                bar.write(estimate(writer.path, max(num_texts - num_stored, 0), sample, encode, dtype, share.count))
            embeds: torch.Tensor | None = None
            for batch in batches:
                if embeds is None:
                    embeds = torch.empty(len(window_texts), batch.embeddings.shape[1], dtype=getattr(torch, dtype))
                embeds[batch.indices] = stored_as(
                    embeds.dtype, batch.embeddings, [window_texts[i] for i in batch.indices]
                )
                summary.num_truncated += batch.num_truncated
                bar.advance(len(batch.indices))
            if settings is None or settings["format"] != FORMAT_VERSION:
                settings = writer.write_settings(embeds.shape[1], dtype, fingerprint)
                check_same_encoder(writer.path, settings, dtype, fingerprint)
            writer.write_shard(embeds, np.stack(keys))
            summary.num_new += len(window_texts)
    if (
        settings is None and first
    ):  # no text fell to this process: the others' store is as wide as any text's embedding
        (batch,) = encode_texts(first, model, processor, token_budget=token_budget)
        writer.write_settings(batch.embeddings.shape[1], dtype, fingerprint)
    summary.seconds = time.perf_counter() - started
    return summary


def estimate(
    path: Path,
    num_texts: int,
    sample: Sequence[str],
    encode: Callable[[Sequence[str]], Iterable[Any]],
    dtype: str,
    num_processes: int,
) -> str:
    """A line that says what embedding `num_texts` will take, estimated from a sample. OSError if the disk has no room for them."""
    started = time.perf_counter()
    dim = [batch.embeddings.shape[1] for batch in encode(sample)][0]
    speed = len(sample) / (time.perf_counter() - started) * num_processes
    size, free = num_texts * bytes_of_text(dim, dtype), shutil.disk_usage(path).free
    line = (
        f"{num_texts:,} texts to embed at most: {size / 1e9:,.2f} GB on the disk ({dim} {dtype}; {free / 1e9:,.2f} GB are free), "
        f"about {_duration(num_texts / speed)} at {speed:,.0f} texts/s"
    )
    if size > free:
        raise OSError(
            errno.ENOSPC, f"there is too little room: {line}. Make room, or store float16 or bfloat16", str(path)
        )
    return line


def bytes_of_text(dim: int, dtype: str) -> int:
    """Bytes on the disk for one text: its embedding, 24 for its key and checksum in the shard, and 32 for both and its row in the index."""
    return dim * getattr(torch, dtype).itemsize + 56


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} seconds" if minutes < 2 else f"{minutes:.0f} minutes" if hours < 2 else f"{hours:.1f} hours"


def _fresh_texts(
    texts: Iterator[str],
    share: Share,
    is_stored: Callable[[np.ndarray], np.ndarray],
    summary: BuildSummary,
    bar: Progress,
) -> Iterator[tuple[str, np.ndarray]]:
    """The texts of `share` that are neither stored nor repeated, each with its key `(2,)`, in input order. Counts what it reads in `summary`."""
    seen = KeySet()
    while chunk := list(islice(texts, _CHUNK)):
        keys = text_keys(chunk)
        mine = share.has(keys)
        stored = mine & is_stored(keys)
        candidates = np.flatnonzero(mine & ~stored & ~seen.contains(keys))
        first = np.sort(np.unique(keys[candidates], axis=0, return_index=True)[1])
        fresh = candidates[first]
        seen.add(keys[fresh])
        num_mine = int(mine.sum())
        summary.num_texts += num_mine
        summary.num_stored += int(stored.sum())
        summary.num_repeated += num_mine - int(stored.sum()) - len(fresh)
        if bar.total is not None:
            # The bar counts texts to embed, so that its rate and its time left are those of the model.
            bar.total = max(bar.total - (num_mine - len(fresh)), 0)
        for position in fresh:
            yield chunk[position], keys[position]


def stored_as(dtype: torch.dtype, embeddings: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
    """`embeddings (n, dim)` in `dtype` on the CPU; ValueError that names the text of one that is not finite."""
    stored = embeddings.to("cpu", dtype)
    bad = (~torch.isfinite(stored)).any(dim=1).nonzero()
    if len(bad):
        row = int(bad[0])
        remedy = "look at the model and at this text"
        if torch.isfinite(embeddings[row]).all():
            remedy = f"its largest value {embeddings[row].abs().max():.3g} does not fit into {dtype}: store bfloat16 or float32"
        raise ValueError(f"the embedding of {shorten(texts[row])} is not finite ({remedy})")
    return stored
