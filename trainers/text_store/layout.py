"""The directory of a text store: its shards, its settings, and the locks by which several processes fill it at the same time."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from trainers.storage.embedding_shard import DTYPES, EmbeddingShard, shard_content
from trainers.storage.files import TEMPORARY_SUFFIX, put_in_place, write_file, writing


logger = logging.getLogger(__name__)

FORMAT_VERSION = 3  # the first whose shards have checksums of their rows
_READ_VERSIONS = (2, FORMAT_VERSION)
SHARD_REMEDY = (
    "Delete this file and build the store again with the same texts: only what this file held is computed anew"
)
INDEX_REMEDY = "Delete this file: it is made anew when the store is used"
LOCKS, TASKS = "locks", "tasks"
# Fields of a fingerprint that say where the text model came from. They decide no embedding: a model that was moved is still the same.
PROVENANCE = ("model", "revision", "text_model_sha256")
# Fields that earlier releases did not record.
ADDED = ("model_dtype", "config", "tokenizer", "encoding", "versions")
_WRITER = re.compile(r"(writer|task)-(\d+)-of-(\d+)")


def shard_paths(path: Path) -> list[Path]:
    """The shards of the store at `path`, in the order in which their rows are counted."""
    return sorted(path.glob("shard-*.safetensors"), key=lambda file: (len(file.name), file.name))


def free_name(path: Path, prefix: str) -> str:
    """The first name of a shard beginning with `prefix` that is not taken."""
    taken = {file.name for file in shard_paths(path)}
    names = (f"{prefix}-{number:05d}.safetensors" for number in count())
    return next(name for name in names if name not in taken)


def open_shard(path: Path, dim: int, dtype: str, fingerprint: Mapping[str, Any] | None = None) -> EmbeddingShard:
    """The shard at `path`; ValueError if it does not fit a store of this `dim`, `dtype` and `fingerprint` (None: of any)."""
    return EmbeddingShard(path, dtype, dim, SHARD_REMEDY, None if fingerprint is None else _hash_of(fingerprint))


def _hash_of(fingerprint: Mapping[str, Any]) -> str:
    """The hash of what every release records of an encoder, wherever that came from."""
    deciding = {key: value for key, value in fingerprint.items() if key not in (*PROVENANCE, *ADDED)}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def read_settings(path: Path) -> dict[str, Any] | None:
    """What store.json says, None where there is none."""
    file = path / "store.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings["format"] not in _READ_VERSIONS:
            raise ValueError(f"its format is {settings['format']!r}, and this version reads formats {_READ_VERSIONS}")
        if (
            settings["dtype"] not in DTYPES
            or not isinstance(settings["dim"], int)
            or not isinstance(settings["fingerprint"], dict)
        ):
            raise ValueError("dim, dtype or fingerprint makes no sense")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} cannot be read as the description of a text store: {error!r}. Restore it, or build a new store elsewhere"
        ) from error
    return settings


def make_directory(path: Path) -> None:
    """Makes the directory of a store. ValueError if it is there and holds something else."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"{path} is a file: a text store is a directory") from error
    foreign = [
        entry.name
        for entry in path.iterdir()
        if entry.name not in (LOCKS, TASKS) and not entry.name.endswith(TEMPORARY_SUFFIX)
    ]
    # After the listing: store.json is written before the first shard, so the files of another process that starts a store here are not taken for foreign ones.
    if foreign and not (path / "store.json").exists():
        raise ValueError(
            f"{path} is not a text store (no store.json) but holds other files such as {foreign[0]!r}: choose another directory"
        )
    (path / LOCKS).mkdir(exist_ok=True)


def store_lock(path: Path, name: str = "store") -> FileLock:
    """A lock of the store at `path`: "store" for its list of files, held for moments; "index" while the index is made."""
    return FileLock(path / LOCKS / name)


class Writer:
    """One of those that fill the store at `path`, which holds the lock `name`, such as "writer-0-of-4". [`writer`] makes it."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name

    def write_settings(self, dim: int, dtype: str, fingerprint: dict[str, Any]) -> dict[str, Any]:
        """Writes store.json for a new store, unless another writer was faster, and raises the format of an old one. Returns its content."""
        with store_lock(self.path):
            settings = read_settings(self.path) or {"dim": dim, "dtype": dtype, "fingerprint": fingerprint}
            if settings.get("format") != FORMAT_VERSION:
                settings = {**settings, "format": FORMAT_VERSION}
                text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
                write_file(self.path / "store.json", text.encode("utf-8"))
        return settings

    def write_shard(self, embeds: torch.Tensor, keys: np.ndarray) -> None:
        """Writes `embeds (n, dim)` with `keys (n, 2)` as the next shard, or as the first that is missing: one deleted because it was damaged
        comes back in its place. After [`write_settings`]."""
        temporary = self.write_temporary(embeds, keys)
        with store_lock(self.path):
            put_in_place(temporary, self.path / free_name(self.path, "shard"))

    def write_temporary(self, embeds: torch.Tensor, keys: np.ndarray) -> Path:
        """Writes a shard that is not in its place yet."""
        settings = read_settings(self.path)
        assert settings is not None
        temporary = self.path / (self.name + TEMPORARY_SUFFIX)
        with writing(temporary, self.path / "shard") as file:
            file.write(shard_content(embeds, keys, _hash_of(settings["fingerprint"])))
        return temporary

    def wait_for_others(self) -> None:
        """Returns when the writers that are at work now have ended. Release the own lock before, or two writers would wait for each other."""
        with store_lock(self.path):
            others = self.others()
        for name in others:
            with store_lock(self.path, name):
                pass

    def others(self) -> list[str]:
        """Names of the other writers at work. Hold the lock "store" while calling this, as it tries the locks of others."""
        return [name for name in self._names() if name != self.name and not _is_free(self.path, name)]

    def check_division(self) -> None:
        """ValueError if others at work divide the texts otherwise: one might embed what another has. Hold the lock "store", as for [`others`]."""
        division = _division(self.name)
        others = [name for name in self._names() if _division(name) != division and not _is_free(self.path, name)]
        if others:
            raise ValueError(
                f"{self.path} is being filled by {', '.join(others[:3])}, but this process is {self.name}: all of them need the same number "
                "of processes or of tasks, or one would embed what another has. Wait for them, or start as many"
            )

    def _names(self) -> list[str]:
        return sorted(file.name for file in (self.path / LOCKS).iterdir() if _WRITER.fullmatch(file.name))


def _division(name: str) -> tuple[str, str]:
    """Into what, and into how many, a writer's texts are divided."""
    match = _WRITER.fullmatch(name)
    assert match is not None
    return match[1], match[3]


@contextmanager
def writer(path: Path, process_index: int, num_processes: int) -> Iterator[Writer]:
    """A writer for part `process_index` of `num_processes` of the store at `path`. Waits, and says so, while another process writes that part.

    The operating system releases its lock however the process ends. Half-written files of killed writers are deleted.

    Raises:
        ValueError: If other processes divide the texts into another number of parts: they might embed the same ones.
    """
    this = Writer(path, f"writer-{process_index}-of-{num_processes}")
    with ExitStack() as held:
        own = store_lock(path, this.name)
        while True:
            with store_lock(path):
                this.check_division()
                try:
                    held.enter_context(own.acquire(timeout=0))
                except Timeout:
                    pass
                else:
                    # While the lock "store" is held no other writer can start, whose file this might be.
                    for leftover in path.glob("writer-*" + TEMPORARY_SUFFIX):
                        name = leftover.name.removesuffix(TEMPORARY_SUFFIX)
                        if name == this.name or _is_free(path, name):
                            leftover.unlink(missing_ok=True)
                    break
            logger.warning("another process is writing the text store %s as %s: waiting for it", path, this.name)
            with own:
                pass  # free again: check the others once more before taking it
        yield this


@cache
def warn_once(message: str) -> None:
    """Logs a warning the first time."""
    logger.warning("%s", message)


def _is_free(path: Path, name: str) -> bool:
    try:
        with store_lock(path, name).acquire(timeout=0):
            return True
    except Timeout:
        return False
