"""The cache of files from object stores: each is downloaded once, read as a local file, and evicted when the cache would grow beyond its limit.

    <PROCLIP_CACHE>/                ~/.cache/proclip by default
        lock                        held while room is made
        locks/<key>                 shared by the processes that read an entry, exclusive to who evicts it
        locks/<key>.fetch           held by the process that downloads into the entry; others wait and find the files there
        <key>/entry.json            address, size and complete files of the entry, by name with size and version
        <key>/files/                the files

An entry is a file, or a folder whose files are needed together (a text store). `PROCLIP_CACHE_SIZE`, such as "200 GB", bounds the sum of all
entries, those that are being downloaded too. The least recently used are evicted first, and none that a process has open.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from .files import TEMPORARY_SUFFIX, put_in_place, write_file
from .object_stores import RemoteFile, download


if sys.platform != "win32":
    import fcntl


DEFAULT_SIZE = "100 GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class CachedFiles:
    """An entry of the cache, which is not evicted before `release`, or before this object and its process are gone.

    Attributes:
        folder: holds the files, by their names.

    Raises:
        OSError: On Windows, which has no locks that several processes share.
    """

    def __init__(self, url: str):
        self._lock: int | None = None
        if sys.platform == "win32":
            raise OSError(
                f"{url} cannot be read on Windows, which lacks the locks of the cache: download it, and name the copy"
            )
        self._cache, key = cache_folder(), hashlib.sha256(url.encode()).hexdigest()[:32]
        self.url, self._entry, self.folder = url, self._cache / key, self._cache / key / "files"
        (self._cache / "locks").mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._cache / "locks" / key, os.O_RDWR | os.O_CREAT)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def __enter__(self) -> "CachedFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def __del__(self):
        self.release()

    def release(self) -> None:
        """The files may be evicted from now on."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def fetch(
        self, files: Sequence[RemoteFile], shown: Callable[[Sequence[RemoteFile]], Iterable[RemoteFile]]
    ) -> None:
        """Makes the entry hold just these `files`. A file that is there in this version is not downloaded again; another version replaces it as a
        whole. `shown` shows the progress of going through the files to download.
        """
        with FileLock(f"{self._cache / 'locks' / self._entry.name}.fetch"):
            before = _read_record(self._entry)
            known = before.get("files", {})
            wanted = {file.name: [file.size, file.version] for file in files}
            for name in known.keys() - wanted.keys():
                (self.folder / name).unlink(missing_ok=True)
            known = {name: version for name, version in known.items() if wanted.get(name) == version}
            missing = [file for file in files if file.name not in known or not self._has(file)]
            record = {"url": self.url, "size": sum(file.size for file in files), "files": known}
            if record != before:
                self._reserve(record)
            for file in shown(missing) if missing else ():
                self._download(file)
                known[file.name] = wanted[file.name]
                _write_record(self._entry, record)
            os.utime(self._entry / "entry.json")

    def _download(self, file: RemoteFile) -> None:
        self.folder.mkdir(exist_ok=True)
        temporary = self.folder / (file.name + TEMPORARY_SUFFIX)
        try:
            download(file, temporary)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        put_in_place(temporary, self.folder / file.name)

    def _has(self, file: RemoteFile) -> bool:
        path = self.folder / file.name
        return path.is_file() and path.stat().st_size == file.size

    def _reserve(self, record: dict[str, Any]) -> None:
        """Evicts what was used least recently until the entry with this `record` has room, and writes the record, which counts from then on.
        OSError if what is being read leaves too little room, or the entry is larger than the whole cache, for which nothing is evicted.
        """
        limit = cache_size()
        with FileLock(self._cache / "lock"):
            others = {file.parent: file.stat().st_mtime for file in self._cache.glob("*/entry.json")}
            others.pop(self._entry, None)
            sizes = {entry: _read_record(entry).get("size", 0) for entry in others}
            fits_alone = record["size"] <= limit
            for entry in sorted(others, key=lambda entry: others[entry]) if fits_alone else ():
                if record["size"] + sum(sizes.values()) > limit and _evict(entry):
                    del sizes[entry]
            if record["size"] + sum(sizes.values()) > limit:
                raise OSError(
                    f"{self.url} has {record['size'] / 1e9:,.2f} GB, which do not fit into the cache {self._cache}: its limit is "
                    f"{limit / 1e9:,.2f} GB{f', and {sum(sizes.values()) / 1e9:,.2f} GB are being read' if fits_alone else ''}. Set PROCLIP_CACHE_SIZE to more, or "
                    "PROCLIP_CACHE to a folder on a larger disk"
                )
            self._entry.mkdir(exist_ok=True)
            _write_record(self._entry, record)


def cached_files(
    url: str,
    files: Sequence[RemoteFile],
    shown: Callable[[Sequence[RemoteFile]], Iterable[RemoteFile]] = iter,
) -> CachedFiles:
    """The entry `url` of the cache with `files`, no two of which have the same name. Several processes may ask for it at a time: one downloads.

    Raises:
        OSError, ValueError: As [`download`]; OSError if the files do not fit into the cache beside those that are being read.
    """
    entry = CachedFiles(url)
    try:
        entry.fetch(files, shown)
    except BaseException:
        entry.release()
        raise
    return entry


def cache_folder() -> Path:
    """`PROCLIP_CACHE`, or else `proclip` in the user's folder of caches. It should be on a disk of the machine itself."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "proclip"
    return Path(os.environ.get("PROCLIP_CACHE") or default).absolute()


def cache_size() -> int:
    """The bytes of `PROCLIP_CACHE_SIZE`; 100 GB by default."""
    text = os.environ.get("PROCLIP_CACHE_SIZE") or DEFAULT_SIZE
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)?\s*", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"PROCLIP_CACHE_SIZE must be a number of bytes, or such as 200 GB or 1.5TB, got {text!r}")
    return int(float(found[1]) * _UNITS[(found[2] or "").upper().removeprefix("B")])


def _evict(entry: Path) -> bool:
    """Deletes an entry, unless a process has it open. Returns whether it is gone."""
    lock = os.open(entry.parent / "locks" / entry.name, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The record goes last, so that what a killed process leaves still counts.
        shutil.rmtree(entry / "files", ignore_errors=True)
        shutil.rmtree(entry)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(lock)


def _read_record(entry: Path) -> dict[str, Any]:
    """What entry.json says; of a file that is not there or is damaged, nothing: the files are downloaded again."""
    try:
        return dict(json.loads((entry / "entry.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _write_record(entry: Path, record: dict[str, Any]) -> None:
    write_file(entry / "entry.json", json.dumps(record).encode())
