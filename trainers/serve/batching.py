"""Dynamic batching: while the model computes, requests wait, and the next batch takes as many of them as the token budget admits."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch


class Overloaded(Exception):
    """More is waiting than may wait."""


@dataclass(frozen=True)
class Item:
    """One text or image to embed.

    Attributes:
        content: what the model takes.
        num_tokens: what it costs of the token budget.
        result: its embedding `(dim,)`, float32, of unit length, when it is there.
    """

    content: Any
    num_tokens: int
    result: "Future[torch.Tensor]" = field(default_factory=Future)


class Batcher:
    """Embeds items on a thread of its own, in the order they came.

    Args:
        embed: contents of a batch to embeddings `(len(batch), dim)`.
        token_budget: most tokens in a batch; an item with more is a batch by itself.
        max_waiting: most tokens that wait.
        on_batch: is told the size of every batch.
    """

    def __init__(
        self,
        embed: Callable[[Sequence[Any]], torch.Tensor],
        token_budget: int,
        max_waiting: int,
        on_batch: Callable[[int], None] = lambda size: None,
    ):
        self._embed, self._token_budget, self._max_waiting, self._on_batch = embed, token_budget, max_waiting, on_batch
        self._items: deque[Item] = deque()
        self._waiting_tokens = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many items wait."""
        return len(self._items)

    @property
    def alive(self) -> bool:
        """Whether items are being embedded."""
        return self._thread.is_alive()

    def submit(self, items: Sequence[Item]) -> None:
        """Take all of `items` or none of them.

        Raises:
            Overloaded: If too much is waiting. One request is always taken where nothing waits.
        """
        num_tokens = sum(item.num_tokens for item in items)
        with self._changed:
            if self._items and self._waiting_tokens + num_tokens > self._max_waiting:
                raise Overloaded
            self._items.extend(items)
            self._waiting_tokens += num_tokens
            self._changed.notify()

    def close(self) -> None:
        """Embed what is waiting, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            wanted = [item for item in batch if item.result.set_running_or_notify_cancel()]
            if not wanted:
                continue
            self._on_batch(len(wanted))
            try:
                embeddings = self._embed([item.content for item in wanted])
            except Exception as error:
                for item in wanted:
                    item.result.set_exception(error)
            else:
                for item, embedding in zip(wanted, embeddings, strict=True):
                    item.result.set_result(embedding)

    def _next_batch(self) -> list[Item]:
        """Waits for items; an empty list says that there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            batch: list[Item] = []
            budget = self._token_budget
            while self._items and (not batch or self._items[0].num_tokens <= budget):
                batch.append(self._items.popleft())
                budget -= batch[-1].num_tokens
            self._waiting_tokens -= sum(item.num_tokens for item in batch)
            return batch
