"""One writer of a folder at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def only_writer(
    folder: Path, refusal: str, *, file: str = ".lock", error: type[BaseException] = ValueError
) -> Iterator[None]:
    """Nobody else writes `folder`, which is made if it is not there, until the block ends, or its process does. Raises `error` with the message
    `refusal` if somebody is writing it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / file)
    try:
        lock.acquire(timeout=0)
    except Timeout as timeout:
        raise error(refusal) from timeout
    try:
        yield
    finally:
        lock.release()
