"""The next item made by a thread while the last one is used."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar


T = TypeVar("T")


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """`items` in their order. An error in making one is raised when its turn comes, so what came before it is used first."""
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item
