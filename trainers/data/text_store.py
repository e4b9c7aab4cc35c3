"""The text store: embeddings of a frozen text model, computed once, kept in memory-mapped files and looked up by text.

A store is a directory:

    store.json                 format version, dim, dtype and the fingerprint of what made the embeddings
    shard-00000.safetensors    `embeds` (n, dim) and `keys` (n, 2) int64, the hashes of the n texts, both in the order in which the texts came
    ...
    index.safetensors          `keys` (2, N) int64 sorted, and `rows` (N,) int64: where each embedding is, counted over all shards in order
    store.lock                 locked by the process that is writing

Shards are written whole or not at all and never changed. The index is a cache, made anew when it does not fit the shards.
"""

import hashlib
import logging
import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from .store_files import (
    DTYPES,
    LOCK_NAME,
    KeySet,
    MappedSafetensors,
    damaged,
    find_keys,
    make_directory,
    open_shard,
    read_settings,
    shard_paths,
    sort_order,
    text_keys,
    write_safetensors,
    write_settings,
    write_shard,
    writer_lock,
)
from .text_encoding import encode_texts, encoder_fingerprint, shorten


logger = logging.getLogger(__name__)

_CHUNK = 4096  # texts hashed and compared with the store at a time


@dataclass
class BuildSummary:
    """What one call of [`TextEmbeddingStore.build`] did.

    Attributes:
        num_texts: texts that it read.
        num_new: texts that it embedded and stored.
        num_stored: texts that the store had already.
        num_repeated: texts that had come earlier in the same call.
        num_truncated: texts among the new ones that were longer than the model reads.
        seconds: duration.
    """

    num_texts: int = 0
    num_new: int = 0
    num_stored: int = 0
    num_repeated: int = 0
    num_truncated: int = 0
    seconds: float = 0.0


class TextEmbeddingStore:
    """Embeddings of a frozen text model by text, read from memory-mapped files: memory grows with what is asked for, not with the store.

    The paper keeps its LLM embeddings in such an offline store (ProCLIP, arXiv 2510.18795, method, stage 1; LLM2CLIP, arXiv 2411.04997).
    A store can be pickled into the workers of a DataLoader: each opens the files anew.

    Args:
        path: directory of the store, as [`TextEmbeddingStore.build`] or `proclip embed` wrote it.

    Attributes:
        path (`Path`): the directory, absolute.
        dim (`int`): size d of an embedding.
        dtype (`torch.dtype`): of the stored embeddings, and of what `lookup` returns.
        fingerprint (`dict`): what made the embeddings, see [`encoder_fingerprint`].
        build_summary (`BuildSummary`, *optional*): what `build` did; None for a store that was opened only.

    Raises:
        FileNotFoundError: If there is no store at `path`.
        ValueError: If a file is damaged or not a store's; names it and the remedy.

    Example:

    ```python
    >>> store = TextEmbeddingStore.build(["a red fox", "a blue boat"], model, processor, "captions.store")
    >>> store.lookup(["a blue boat"]).shape
    torch.Size([1, 576])
    ```"""

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        settings = read_settings(self.path)
        if settings is None:
            raise FileNotFoundError(
                f"{self.path} is no text store: it has no store.json. `proclip embed TEXTS --model DIR --output {self.path}` makes one"
            )
        self.dim: int = settings["dim"]
        self.dtype: torch.dtype = getattr(torch, settings["dtype"])
        self.fingerprint: dict[str, Any] = settings["fingerprint"]
        self.build_summary: BuildSummary | None = None
        self._shards = [open_shard(file, self.dim, settings["dtype"]) for file in shard_paths(self.path)]
        sizes = [shard.shape("keys")[0] for shard in self._shards]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # first row of each shard, and the end
        self._keys, self._rows = self._open_index()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __contains__(self, text: str) -> bool:
        return bool(self._find([text])[0] >= 0)

    @property
    def num_bytes(self) -> int:
        """Size of all files on the disk."""
        return sum(file.stat().st_size for file in self.path.iterdir())

    def __repr__(self) -> str:
        return f"TextEmbeddingStore({str(self.path)!r}: {len(self):,} texts, dim {self.dim}, {self.dtype})"

    def __reduce__(self):
        return TextEmbeddingStore, (self.path,)

    def lookup(self, texts: Sequence[str]) -> torch.Tensor:
        """The embeddings of `texts`, in their order.

        Returns:
            `(len(texts), dim)` tensor of the store's dtype on the CPU.

        Raises:
            KeyError: If texts are not in the store; names the first three, tells how many there are and the remedy.
        """
        if isinstance(texts, str):
            raise TypeError("lookup takes a list of texts, not one string")
        rows = self._find(texts)
        if (rows < 0).any():
            missing = list(dict.fromkeys(text for text, row in zip(texts, rows, strict=True) if row < 0))
            named = ", ".join(shorten(text) for text in missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise KeyError(
                f"{len(missing):,} of the texts are not in the text store {self.path}: {named}. "
                "Add them with TextEmbeddingStore.build or `proclip embed`; it embeds only what is not there yet"
            )
        result = torch.empty(len(rows), self.dim, dtype=self.dtype)
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], self._starts)
        for shard, start, begin, end in zip(self._shards, self._starts, bounds, bounds[1:], strict=False):
            if begin < end:
                positions = torch.from_numpy(order[begin:end])
                inside = torch.from_numpy(rows[order[begin:end]] - start)
                result[positions] = shard.tensor("embeds")[inside]
        return result

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (of the population) of each dimension over all stored embeddings, for the adapter's input norm
        "standardize". Accumulated in float64 and read in blocks, so memory does not grow with the store.

        Returns:
            Two `(dim,)` float64 tensors.

        Raises:
            ValueError: If the store is empty.
        """
        if not len(self):
            raise ValueError(f"the text store {self.path} is empty: it has no statistics")
        count, mean, squares = (
            0,
            torch.zeros(self.dim, dtype=torch.float64),
            torch.zeros(self.dim, dtype=torch.float64),
        )
        for shard in self._shards:
            for block in shard.tensor("embeds").split(_CHUNK):
                # Chan, Golub and LeVeque's update: sums of squares around each block's own mean, so nothing cancels.
                block = block.to(torch.float64)
                block_mean, total = block.mean(dim=0), count + len(block)
                squares += (block - block_mean).square().sum(dim=0) + (block_mean - mean).square() * (
                    count * len(block) / total
                )
                mean += (block_mean - mean) * (len(block) / total)
                count = total
        return mean, (squares / count).sqrt()

    @classmethod
    def build(
        cls,
        texts: Iterable[str],
        model: torch.nn.Module,
        processor: Any,
        path: str | Path,
        *,
        token_budget: int | None = None,
        shard_size: int = 8192,
        dtype: str = "float32",
        progress: bool = True,
    ) -> "TextEmbeddingStore":
        """Embeds those of `texts` that the store at `path` does not have yet, and opens the store.

        The texts are read as a stream, and every `shard_size` new ones become one shard, in the order in which they came. A process that
        is killed loses at most the shard it was at; called again with the same arguments, it ends with the bytes of an uninterrupted
        build. A second process that builds the same store waits for the first, then adds what is still missing.

        Args:
            texts: any iterable of strings; repeated ones are embedded once. If it has a length, the progress bar shows the time left.
            model: a `ProCLIPModel` (the pooled LLM embeddings, before the adapter, are stored) or a model with `get_text_features` such as
                `CLIPModel` (its projected text embeddings are stored). It is put in eval mode.
            processor: the model's processor, or the tokenizer of a CLIP.
            path: directory of the store; made if it is not there.
            token_budget: padded tokens in a batch, see [`encode_texts`].
            shard_size: texts in a shard. Also how much work a killed process can lose.
            dtype: "float32", "float16" or "bfloat16": of the stored embeddings.
            progress: whether to show a progress bar.

        Returns:
            The opened store; its `build_summary` tells what was done.

        Raises:
            ValueError: If the store was made by another model, template, pooling, length or dtype (names the field and both values), if
                an embedding is not finite (names the text), or if there are no texts and no store.
            OSError: If the disk is full; the shards that were finished stay.
        """
        if isinstance(texts, str):
            raise TypeError("build takes an iterable of texts, not one string")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {shard_size}")
        summary, started = BuildSummary(), time.perf_counter()
        path = Path(path).absolute()
        fingerprint = encoder_fingerprint(model, processor)
        make_directory(path)
        with writer_lock(path), tqdm(desc="embedding texts", unit=" texts", disable=not progress) as bar:
            settings = read_settings(path)
            if settings is not None:
                _check_same_encoder(path, settings, dtype, fingerprint)
            fresh = _fresh_texts(texts, None if settings is None else cls(path), summary, bar)
            while window := list(islice(fresh, shard_size)):
                window_texts, keys = zip(*window, strict=True)
                embeds: torch.Tensor | None = None
                for batch in encode_texts(window_texts, model, processor, token_budget=token_budget):
                    if embeds is None:
                        embeds = torch.empty(len(window), batch.embeddings.shape[1], dtype=getattr(torch, dtype))
                    embeds[batch.indices] = _stored_as(
                        embeds.dtype, batch.embeddings, [window_texts[i] for i in batch.indices]
                    )
                    summary.num_truncated += batch.num_truncated
                    bar.update(len(batch.indices))
                if settings is None:
                    settings = write_settings(path, embeds.shape[1], dtype, fingerprint)
                write_shard(path, embeds, np.stack(keys))
                summary.num_new += len(window)
        if settings is None:
            raise ValueError(f"there are no texts to embed, and no text store at {path} yet")
        if summary.num_truncated:
            logger.warning(
                "%s of the texts were longer than the model reads and were cut", f"{summary.num_truncated:,}"
            )
        store = cls(path)
        summary.seconds = time.perf_counter() - started
        store.build_summary = summary
        return store

    def _find(self, texts: Sequence[str]) -> np.ndarray:
        """Row of each text over all shards, -1 where it is missing: `(len(texts),)` int64."""
        return self._find_keys(text_keys(texts))

    def _find_keys(self, keys: np.ndarray) -> np.ndarray:
        positions = find_keys(self._keys, keys)
        rows = np.full(len(keys), -1, dtype=np.int64)
        rows[positions >= 0] = self._rows[positions[positions >= 0]]
        return rows

    def _open_index(self) -> tuple[np.ndarray, np.ndarray]:
        """The sorted keys `(2, N)` and their rows `(N,)`: mapped from the index file, which is made anew where it does not fit."""
        names = "".join(f"{shard.path.name} {shard.metadata['keys_blake2b']}\n" for shard in self._shards)
        digest = hashlib.blake2b(names.encode(), digest_size=16).hexdigest()
        with suppress(FileNotFoundError, ValueError):
            return self._map_index(digest)
        keys = np.concatenate([np.empty((0, 2), np.int64), *(shard.tensor("keys").numpy() for shard in self._shards)])
        order = sort_order(keys)
        keys = np.ascontiguousarray(keys[order].T)
        # Without the lock, a writer could take the temporary file for a leftover. A store that is being written or is read-only keeps the
        # index in memory.
        with suppress(OSError), FileLock(self.path / LOCK_NAME, timeout=0):
            tensors = {"keys": torch.from_numpy(keys), "rows": torch.from_numpy(order)}
            write_safetensors(self.path / "index.safetensors", tensors, {"shards_blake2b": digest})
            return self._map_index(digest)
        return keys, order

    def _map_index(self, digest: str) -> tuple[np.ndarray, np.ndarray]:
        index = MappedSafetensors(self.path / "index.safetensors", {"keys": ("I64", 2), "rows": ("I64", 1)})
        if index.metadata.get("shards_blake2b") != digest:
            raise damaged(index.path, "it belongs to other shards")
        return index.tensor("keys").numpy(), index.tensor("rows").numpy()


def _fresh_texts(
    texts: Iterable[str], store: TextEmbeddingStore | None, summary: BuildSummary, bar: tqdm
) -> Iterator[tuple[str, np.ndarray]]:
    """The texts that are neither in `store` nor repeated, each with its key `(2,)`, in input order. Counts what it reads in `summary`."""
    bar.total = operator.length_hint(texts, 0) or None
    texts, seen = iter(texts), KeySet()
    while chunk := list(islice(texts, _CHUNK)):
        keys = text_keys(chunk)
        stored = np.zeros(len(chunk), bool) if store is None else store._find_keys(keys) >= 0
        candidates = np.flatnonzero(~stored & ~seen.contains(keys))
        first = np.sort(np.unique(keys[candidates], axis=0, return_index=True)[1])
        fresh = candidates[first]
        seen.add(keys[fresh])
        summary.num_texts += len(chunk)
        summary.num_stored += int(stored.sum())
        summary.num_repeated += len(chunk) - int(stored.sum()) - len(fresh)
        if bar.total is not None:
            # The bar counts texts to embed, so that its rate and its time left are those of the model.
            bar.total = max(bar.total - (len(chunk) - len(fresh)), 0)
        for position in fresh:
            yield chunk[position], keys[position]


def _stored_as(dtype: torch.dtype, embeddings: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
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


def _check_same_encoder(path: Path, settings: dict[str, Any], dtype: str, fingerprint: dict[str, Any]) -> None:
    """ValueError that names the first field in which the encoder differs from the one that made the store, with both values."""
    there, here = {"dtype": settings["dtype"], **settings["fingerprint"]}, {"dtype": dtype, **fingerprint}
    for field in there | here:
        # A model that was moved or renamed is still the same: its weights decide.
        if field not in ("model", "revision") and there.get(field) != here.get(field):
            raise ValueError(
                f"the text store {path} was made with {field} = {there.get(field)!r} (model {there['model']!r}), but now {field} = "
                f"{here.get(field)!r} (model {here['model']!r}): build a store of its own for it, in another directory"
            )
