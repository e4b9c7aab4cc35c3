"""Claims to a store's tasks: the process that holds one embeds that task. If it dies, the operating system frees the claim for the next one that asks.

A claim is a file lock (`flock`). It holds between machines on NFS 4 and most other shared file systems; on some only with a mount option (Lustre's
`-o flock`), and on others, silently, only within one machine. To notice that, the process that holds a claim also touches a file every few seconds.
"""

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import Timeout

from trainers.storage.files import write_file

from .layout import TASKS, store_lock


logger = logging.getLogger(__name__)

_BEAT = 5.0  # seconds between signs of life
_MISSED = 4  # beats without one after which the process is dead


@contextmanager
def claimed(path: Path, name: str) -> Iterator[bool]:
    """Claims the task `name` of the store at `path` for this process until the block ends, or the process does. Gives whether it did: another may hold it.

    Raises:
        OSError: If the process that holds it, on another machine, is still alive: locks do not hold between the machines.
    """
    lock = store_lock(path, name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        file = path / TASKS / f"{name}.running"
        _check_dead(file)
        with _signs_of_life(file):
            yield True
    finally:
        lock.release()


def running_process(path: Path, name: str) -> dict[str, str | int] | None:
    """The "host" and "pid" of the process that holds the claim, or died while it did; None if the task waits for one, or is done."""
    try:
        return json.loads((path / TASKS / f"{name}.running").read_text())
    except (FileNotFoundError, ValueError):
        return None


@contextmanager
def _signs_of_life(file: Path) -> Iterator[None]:
    owner = {"machine": _machine(), "host": platform.node(), "pid": os.getpid()}
    write_file(file, json.dumps(owner).encode())
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT):
            with suppress(OSError):  # of a shared file system that is away for a moment
                os.utime(file)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        file.unlink(missing_ok=True)


def _check_dead(file: Path) -> None:
    """Returns if the process that wrote `file` has ended, whose lock this process has got."""
    try:
        owner = json.loads(file.read_text())
        if owner["machine"] == _machine():
            return  # the locks of one machine are to be relied on
        logger.warning(
            "process %s of %s has left a task unfinished: making sure that it has ended", owner["pid"], owner["host"]
        )
        last = _changed(file)
        for _ in range(2 * _MISSED):
            time.sleep(_BEAT / 2)
            if _changed(file) != last:
                raise OSError(
                    f"process {owner['pid']} of {owner['host']} is at work on {file.stem} of the text store {file.parent.parent}, and yet this "
                    "process has got its lock: locks of this file system do not hold between machines. Mount it so that they do (NFS 4; Lustre "
                    "with -o flock), or fill the store from one machine"
                )
    except (FileNotFoundError, ValueError, KeyError):
        return  # it has ended in the meantime, or was killed while it wrote the file


def _changed(file: Path) -> int:
    """When a file was changed, in nanoseconds. Opening it makes NFS ask the server."""
    with open(file, "rb") as opened:
        return os.fstat(opened.fileno()).st_mtime_ns


def _machine() -> str:
    """What tells this machine from others that have the same name: containers on one machine share its locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
