"""The text store: embeddings of a frozen text model, computed once, kept in files and looked up by text.

A store is a directory:

    store.json                 format version, dim, dtype and the fingerprint of what made the embeddings
    shard-00000.safetensors    `embeds` (n, dim) and `keys` (n, 2) int64, the hashes of the n texts, in the order in which the texts came;
                               `checksums` (n,) int64 of each embedding with its key; in the metadata, a hash of the fingerprint
    ...
    index.safetensors          `keys` (2, N) int64 sorted, and `rows` (N,) int64: where each embedding is, counted over all shards in order
    locks/, tasks/             what the processes that write it tell each other

Shards are written whole or not at all and never changed. The index is a cache, made anew when it does not fit the shards.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainers.storage.embedding_shard import DTYPES
from trainers.storage.object_stores import is_address

from .index import Index, open_index
from .keys import text_keys
from .layout import make_directory, open_shard, read_settings, shard_paths, warn_once, writer
from .remote import check_complete, check_directory, fetch_store
from .row_reader import RowReader


if TYPE_CHECKING:
    from .build import BuildSummary


class TextEmbeddingStore:
    """Embeddings of a frozen text model by text, read from files row by row: memory does not grow with the store.

    The paper keeps its LLM embeddings in such an offline store (ProCLIP, arXiv 2510.18795, method, stage 1; LLM2CLIP, arXiv 2411.04997).
    A store can be pickled into the workers of a DataLoader: each opens the files anew.

    Args:
        path: directory of the store, as [`TextEmbeddingStore.build`] or `proclip embed` wrote it, or the address of a copy in an object store
            (`s3://bucket/captions.store`), which is downloaded into the cache first, see [`~trainers.storage.file_cache`].

    Attributes:
        path (`Path`): the directory, absolute; of a store in an object store, the copy in the cache.
        place (`str`): what `path` was given as, for messages.
        dim (`int`): size d of an embedding.
        dtype (`torch.dtype`): dtype of the stored embeddings and of what `lookup` returns.
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
        self.place = str(path)
        # What is in the cache is not evicted as long as this object lives.
        self._cached = fetch_store(self.place) if is_address(path) else None
        self.path = Path(path if self._cached is None else self._cached.folder).absolute()
        settings = read_settings(self.path)
        if settings is None:
            raise FileNotFoundError(
                f"{self.path} is not a text store: it has no store.json. `proclip embed TEXTS --model DIR --output {self.path}` makes one"
            )
        self.dim: int = settings["dim"]
        self.dtype: torch.dtype = getattr(torch, settings["dtype"])
        self.fingerprint: dict[str, Any] = settings["fingerprint"]
        self.build_summary: BuildSummary | None = None
        self.shards = [
            open_shard(file, self.dim, settings["dtype"], self.fingerprint) for file in shard_paths(self.path)
        ]
        self._reader = RowReader(self.shards, self.dim, self.dtype)
        old = sum(not shard.has_checksums for shard in self.shards)
        if old:
            warn_once(
                f"{old:,} of {len(self.shards):,} shards of the text store {self.path} were written by an earlier release, without checksums of "
                "their rows: a look-up compares the keys of their texts only, and an embedding in which a bit has changed is not noticed. "
                "`proclip embed --verify STORE` reads all of it and compares"
            )

    @cached_property
    def index(self) -> Index:
        """Where the embedding of each key is. Opened when it is used first, and made if there is none."""
        return open_index(self.path, self.shards)

    def __len__(self) -> int:
        return len(self._reader)

    def __contains__(self, text: str) -> bool:
        return bool(self.find(text_keys([text]))[0] >= 0)

    @property
    def num_bytes(self) -> int:
        """Size of all files on the disk."""
        return sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())

    def __repr__(self) -> str:
        return f"TextEmbeddingStore({self.place!r}: {len(self):,} texts, dim {self.dim}, {self.dtype})"

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
        keys = text_keys(texts)
        rows, checksums = self.index.find(keys)
        if (rows < 0).any():
            missing = list(dict.fromkeys(text for text, row in zip(texts, rows, strict=True) if row < 0))
            raise KeyError(self.missing_message(missing))
        return self._reader.read(rows, keys, checksums)

    def missing_message(self, missing: Sequence[str]) -> str:
        """What to say of texts that are not in the store."""
        from .encoding import shorten

        named = ", ".join(shorten(text) for text in missing[:3]) + (", ..." if len(missing) > 3 else "")
        remedy = "Add them with TextEmbeddingStore.build or `proclip embed`; it embeds only what is not there yet"
        if self._cached is not None:
            remedy = "A store in an object store is only read: download it, add them by `proclip embed`, and upload it"
        return f"{len(missing):,} of the texts are not in the text store {self.place}: {named}. {remedy}"

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Row of each of `keys (n, 2)` over all shards, -1 where it is missing: `(n,)` int64. See [`Index.find`]."""
        return self.index.find(keys)[0]

    def blocks(self) -> Iterator[torch.Tensor]:
        """All embeddings, in blocks `(n, dim)` of at most 4,096, shard by shard, compared with their checksums."""
        for shard in self.shards:
            yield from shard.blocks()

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
        for block in self.blocks():
            # Chan, Golub and LeVeque's update: sums of squares around each block's own mean, so nothing cancels.
            block = block.to(torch.float64)
            block_mean, total = block.mean(dim=0), count + len(block)
            squares += (block - block_mean).square().sum(dim=0)
            squares += (block_mean - mean).square() * (count * len(block) / total)
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
        process_index: int = 0,
        num_processes: int = 1,
        num_tasks: int | None = None,
    ) -> "TextEmbeddingStore":
        """Embeds those of `texts` that the store at `path` does not have yet, each once, and adds them.

        A build that was interrupted continues where it was when it is called again: to the same bytes, if it gets the same texts and settings.

        Several processes can fill one store. With `num_tasks`, each takes one part of the texts after the other and reads no other; with
        `process_index` and `num_processes`, each reads all of them and embeds those whose hash falls to it. Then it waits for those that are
        still at work. What they leave is the same to look up as what one process leaves, but the rows are in another order.

        Args:
            texts: any iterable of strings, read once and in pieces. From 10,000 texts on, if it tells how many there are
                (`operator.length_hint`), size and time are estimated, and the disk must have room.
            model, processor: what embeds them, see [`encode_texts`]: a [`ProCLIPModel`] with its processor, or a CLIP with its processor or
                tokenizer.
            path: directory of the store; made if it is not there. A store at an address (`s3://...`) is only read: that is an error if it lacks one
                of `texts`.
            token_budget: padded tokens in a batch, see [`encode_texts`].
            shard_size: texts in a shard. Also how much work a killed process can lose. For tens of millions of texts take 65,536: thousands of
                files are slower to look up in than hundreds.
            dtype: dtype of the stored embeddings: "float32", "float16" or "bfloat16".
            progress: whether to show a progress bar.
            process_index, num_processes: which of the processes that fill the store this one is. All get the same texts.
            num_tasks: into how many tasks the texts are divided, some tens for each process. `texts` is then a list or what [`divide_texts`]
                opens. Any number of processes call this with the same arguments, at any time; each returns when all tasks are done, also those
                of processes that died.

        Returns:
            The opened store; its `build_summary` tells what this process did.

        Raises:
            ValueError: If the store was made by another encoder or has another dtype (names what differs, see [`encoder_fingerprint`]), if
                an embedding is not finite (names the text), if other processes fill it as another number of processes or tasks, if its tasks
                are of other texts and not all done, or if there are no texts and no store.
            OSError: If the disk has too little room, or becomes full; the shards that were finished stay. With `num_tasks`: if the locks of
                the file system do not hold between machines.
        """
        from . import build as store_build
        from .encoding import encoder_fingerprint
        from .fingerprint import check_same_encoder
        from .tasks import DividedTexts, TextList, build_in_tasks

        if isinstance(texts, str):
            raise TypeError("build takes an iterable of texts, not one string")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {shard_size}")
        share = store_build.Share(process_index, num_processes)
        if num_tasks is not None and num_processes > 1:
            raise ValueError("num_tasks takes the place of process_index and num_processes: leave these out")
        if num_tasks is not None:
            check_directory(path)
        fingerprint = encoder_fingerprint(model, processor)
        if is_address(path):
            started = time.perf_counter()
            try:
                store = cls(path)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{error}. A store in an object store is only read: build it in a folder of this machine, and upload that"
                ) from error
            there = {"dtype": str(store.dtype).removeprefix("torch."), "fingerprint": store.fingerprint}
            check_same_encoder(path, there, dtype, fingerprint)
            num_texts = check_complete(store, texts)
            store.build_summary = store_build.BuildSummary(
                num_texts, num_stored=num_texts, seconds=time.perf_counter() - started
            )
            return store
        path = Path(path).absolute()
        make_directory(path)

        def opened() -> "TextEmbeddingStore | None":
            settings = read_settings(path)
            if settings is None:
                return None
            check_same_encoder(path, settings, dtype, fingerprint)
            return cls(path)

        options: dict[str, Any] = {
            "token_budget": token_budget,
            "shard_size": shard_size,
            "dtype": dtype,
            "progress": progress,
        }
        if num_tasks is not None:
            opened()
            divided = TextList(texts) if isinstance(texts, Sequence) else texts
            if not isinstance(divided, DividedTexts):
                raise TypeError(
                    f"num_tasks needs a list of texts, or what divide_texts opens, not a {type(texts).__name__}"
                )
            summary = build_in_tasks(path, divided, model, processor, fingerprint, num_tasks, **options)
        else:
            with writer(path, process_index, num_processes) as this:
                stored = opened()
                summary = store_build.build_store(
                    this,
                    texts,
                    model,
                    processor,
                    fingerprint,
                    (lambda keys: np.zeros(len(keys), bool))
                    if stored is None
                    else (lambda keys: stored.find(keys) >= 0),
                    0 if stored is None else len(stored),
                    share=share,
                    **options,
                )
            this.wait_for_others()
        built = opened()
        if built is None:
            raise ValueError(f"there are no texts to embed, and no text store at {path} yet")
        built.index  # noqa: B018 - made now, so that who opens the store next need not wait
        built.build_summary = summary
        return built
