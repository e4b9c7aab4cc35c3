"""A text store that embeds what it lacks, for texts that nobody could know before."""

import copy
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from .build import stored_as
from .encoding import encode_texts, encoder_fingerprint
from .fingerprint import check_same_encoder
from .keys import text_keys
from .store import TextEmbeddingStore


logger = logging.getLogger(__name__)


class OnTheFlyStore:
    """A [`TextEmbeddingStore`] with the model that made it: `lookup` embeds texts that are missing instead of refusing them. Trainers take it as
    `text_store`.

    What is embedded here is kept in memory, the most recently used texts of it, and not written: many processes and data workers
    would leave thousands of tiny shards. Texts that are known before training are cheaper to embed before, by `proclip embed`, once
    and in large batches.

    An embedding can differ in its last bits with the texts that it is embedded with, so a training that was resumed is the same to the bit
    only if no text was missing.

    Args:
        store: what is looked up first.
        model, processor: what `store` was made by, see [`encode_texts`]. A `ProCLIPModel` with its LLM; the model in training may be
            given, whose LLM does not change.
        num_cached: texts whose embeddings are kept in memory.

    Attributes:
        num_embedded (`int`): texts that were embedded so far, in this process.

    Raises:
        ValueError: If `store` was made by another encoder; names the field and both values. On `lookup`: if the model is on a GPU and a
            data worker asks, which cannot use it.
    """

    def __init__(self, store: TextEmbeddingStore, model: torch.nn.Module, processor: Any, num_cached: int = 100_000):
        dtype = str(store.dtype).removeprefix("torch.")
        settings = {"dtype": dtype, "fingerprint": store.fingerprint}
        check_same_encoder(store.path, settings, dtype, encoder_fingerprint(model, processor))
        self.store, self.processor, self.num_cached = store, processor, num_cached
        # A trainer takes the LLM off the model that it trains; this one keeps it. The weights are the same.
        self.model = copy.copy(model)
        self.model._modules = dict(model._modules)
        self.num_embedded = 0
        self._cache: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def lookup(self, texts: Sequence[str]) -> torch.Tensor:
        """The embeddings of `texts`, in their order: `(len(texts), dim)` of the store's dtype, on the CPU."""
        keys = text_keys(texts)
        found = self.store.find(keys) >= 0
        result = torch.empty(len(texts), self.store.dim, dtype=self.store.dtype)
        result[torch.from_numpy(found)] = self.store.lookup([texts[i] for i in np.flatnonzero(found).tolist()])
        missing: dict[bytes, list[int]] = {}
        for position in np.flatnonzero(~found).tolist():
            missing.setdefault(keys[position].tobytes(), []).append(position)
        # Several threads may look up at the same time, so what is used here is taken out of the cache first.
        embeds = {key: embed for key in missing if (embed := self._cache.pop(key, None)) is not None}
        embeds |= self._embed({key: texts[places[0]] for key, places in missing.items() if key not in embeds})
        for key, places in missing.items():
            result[places] = self._cache[key] = embeds[key]
        while len(self._cache) > self.num_cached:
            self._cache.popitem(last=False)
        return result

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Statistics of the texts in the store, see [`TextEmbeddingStore.statistics`]."""
        return self.store.statistics()

    def _embed(self, texts: dict[bytes, str]) -> dict[bytes, torch.Tensor]:
        """The embeddings of `texts`, by their keys, in the store's dtype."""
        if not texts:
            return {}
        if get_worker_info() is not None and next(self.model.text_model.parameters()).device.type != "cpu":
            raise ValueError(
                self.store.missing_message(list(texts.values()))
                + ". To embed them while training, set dataloader_num_workers=0: a data worker cannot use the GPU that the LLM is on"
            )
        if not self.num_embedded:
            logger.warning("texts that are not in %s are embedded while they are looked up", self.store.path)
        keys, values = list(texts), list(texts.values())
        found: dict[Any, torch.Tensor] = {}
        for batch in encode_texts(values, self.model, self.processor):
            embeds = stored_as(self.store.dtype, batch.embeddings, [values[i] for i in batch.indices])
            found.update(zip([keys[i] for i in batch.indices], embeds, strict=True))
        self.num_embedded += len(texts)
        return found
