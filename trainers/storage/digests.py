"""What a file holds, told by a hash."""

import hashlib
import os
import time


# Path -> signature and SHA-256 of the files that this process has hashed.
known: dict[str, tuple[tuple[int, ...], str]] = {}

_BLOCK = 1 << 20  # bytes
_SETTLED = 1.0  # seconds: a file that changed later than that may change again within the clock's resolution


def file_digest(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits.

    A process reads a file once as long as its device, inode, size, and times of modification and of change stay the same. The time of change cannot
    be set by a program, so a file that was replaced under an old time of modification (`rsync -t`, `tar x`, `cp -p`) is read again.
    """
    name, signature = os.fspath(path), _signature(path)
    before, digest = known.get(name, (None, ""))
    if before == signature:
        return digest
    settled = signature[-1] < (time.time() - _SETTLED) * 1e9
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            hashed.update(block)
    if settled and signature == _signature(path):
        known[name] = signature, hashed.hexdigest()
    return hashed.hexdigest()


def _signature(path: str | os.PathLike) -> tuple[int, ...]:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
