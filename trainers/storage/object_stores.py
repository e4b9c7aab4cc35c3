"""Files in object stores, at the addresses that fsspec reads (s3://, gs://, hf://, memory://): listed, told apart by version, downloaded.

Addresses come from the user's command line or recipe, never from rows of data. Credentials come from where each store's own package looks for
them (AWS_ACCESS_KEY_ID, `gcloud auth`, HF_TOKEN, ...), never from an address, so that no log, record or card can show them.
"""

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
import fsspec.asyn


logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://(.*)", re.DOTALL)
_QUERY = re.compile(r"[?&][\w-]+=")
_MAGIC = "*?["
# What file systems call the version of a file: hash or number of its content, or else the time at which it was written.
_VERSIONS = ("ETag", "etag", "generation", "blob_id", "created", "LastModified", "mtime")
# A process that was forked, such as a data worker, has neither the thread that reads remote files nor whoever may hold its lock: without this
# it would wait for ever.
if sys.platform != "win32":
    os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)

_ATTEMPTS = 3  # downloads of a file, besides what the store's package retries
# Errors of the local disk. Trying again would not help.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG)


def is_address(place: str | os.PathLike) -> bool:
    """Whether `place` is an address such as `s3://bucket/folder`, not a path."""
    return _ADDRESS.match(str(place)) is not None


def check_address(place: str | os.PathLike) -> None:
    """ValueError, in which `place` is not repeated, if it is an address that holds credentials: to call before it is written down anywhere."""
    found = _ADDRESS.fullmatch(str(place))
    if found is not None and ("@" in found[2].partition("/")[0] or _QUERY.search(found[2])):
        raise ValueError(
            f"an address of {found[1]}:// holds a user name, a password or a query, which records and logs would show: give the address "
            "alone, and the credentials as variables or in the files that its package reads"
        )


@dataclass(frozen=True)
class RemoteFile:
    """A file in an object store as it was when it was listed.

    Attributes:
        url: its address.
        size: bytes.
        version: tells this content from any that is put there later; the ETag in S3.
    """

    url: str
    size: int
    version: str

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]


def list_remote(place: str) -> list[RemoteFile]:
    """The files at an address, in the order of their addresses: that file, those that match a pattern, or all below a folder.

    Raises:
        FileNotFoundError: If there are none, or there is no such bucket.
        ValueError: If the address is of an unknown kind, or holds a password or a query.
        ImportError: If the package of its protocol is not installed.
        OSError: If the store cannot be reached, or refuses the credentials.
    """
    system = _file_system(place)
    with _in_one_line(place):
        system.invalidate_cache()
        if any(character in place for character in _MAGIC):
            found = system.glob(place, detail=True)
        else:
            info = system.info(place)
            found = {info["name"]: info} if info["type"] == "file" else system.find(place, detail=True)
    files = [_described(info, place) for info in found.values() if info["type"] == "file"]
    if not files:
        raise FileNotFoundError(f"there are no files at {place}")
    return sorted(files, key=lambda file: file.url)


def download(file: RemoteFile, target: Path) -> None:
    """Writes `file` to `target`, which is on the disk afterwards. A download that is cut off is repeated twice.

    Raises:
        FileNotFoundError, OSError: As [`list_remote`], if the download is cut off every time, or if `target` cannot be written, as on a full disk.
        ValueError: If there is another version at the address by now.
    """
    system = _file_system(file.url)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with _in_one_line(file.url):
                system.get_file(file.url, str(target))
            if (size := target.stat().st_size) != file.size:
                _check_unchanged(system, file)
                raise ConnectionError(f"{file.url} was cut off after {size:,} of {file.size:,} bytes")
            break
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            if error.errno in _DISK_ERRORS:
                reason = f"{file.url} cannot be written there ({error.strerror}): set PROCLIP_CACHE to a folder on another disk"
                raise OSError(error.errno, reason, str(target.parent)) from error
            if attempt == _ATTEMPTS:
                raise
            logger.warning("%s: trying again", error)
    _check_unchanged(system, file)
    with open(target, "rb+") as written:
        os.fsync(written.fileno())


def _check_unchanged(system: Any, file: RemoteFile) -> None:
    with _in_one_line(file.url):
        system.invalidate_cache()
        now = _described(system.info(file.url), file.url)
    if (now.size, now.version) != (file.size, file.version):
        raise ValueError(
            f"{file.url} has changed since it was listed: it had {file.size:,} bytes and version {file.version}, and has {now.size:,} bytes "
            f"and version {now.version}. Put it back, or start again with the new one"
        )


def _described(info: dict[str, Any], place: str) -> RemoteFile:
    """A file that was listed at `place`, with an address of the same kind."""
    name = info["name"]
    url = name if is_address(name) else f"{place.partition('://')[0]}://{name.lstrip('/')}"
    version = next((info[name] for name in _VERSIONS if info.get(name)), None)
    if version is None or info.get("size") is None:
        raise ValueError(f"{url}: its server does not tell size and version, so a change of it would go unnoticed")
    if isinstance(version, datetime):
        version = version.timestamp()  # as some file systems give it in lists
    return RemoteFile(url, info["size"], str(version).strip('"'))


def _file_system(place: str) -> Any:
    check_address(place)
    protocol = place.partition("://")[0]
    if protocol in ("file", "local") or "::" in place:
        raise ValueError(f"{place}: files of this computer are named by their paths, and archives are not opened")
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        raise ImportError(f"{place} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{place} cannot be read: {protocol}:// is not a protocol that fsspec knows") from error


@contextmanager
def _in_one_line(place: str) -> Iterator[None]:
    """Says in one line why `place` cannot be read; the packages of the stores raise errors of their own."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is nothing at {place} ({_first_line(error)})") from error
    except PermissionError as error:
        raise PermissionError(f"{place} may not be read with these credentials ({_first_line(error)})") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        raise OSError(
            f"{place} cannot be read ({_first_line(error)}). Check the network, the address, and the credentials"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"
