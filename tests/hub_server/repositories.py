"""What the stand-in keeps: repositories, their commits and files, and how the Hub names and lists these."""

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    sha256: str
    size: int
    oid: str  # as git names it: of the content, or of the pointer to a large file
    lfs: bool


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str
    parent: str | None
    message: str
    files: dict[str, Blob]


@dataclass
class Repository:
    """Commits, and the names of some of them."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)

    def commit(self, branch: str, message: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        oid = secrets.token_hex(20)
        self.commits[oid] = Commit(oid, parent, message, files)
        self.branches[branch] = oid
        return self.commits[oid]


def git_oid(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """The file that git keeps in place of a large one."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def folders_of(paths: Iterable[str]) -> set[str]:
    """All folders that hold files of these paths."""
    return {str(folder) for path in paths for folder in PurePosixPath(path).parents} - {"."}


def describe_folder(path: str) -> dict[str, Any]:
    """A folder's entry of a tree."""
    return {"type": "directory", "oid": git_oid(path.encode()), "size": 0, "path": path}


def describe(path: str, blob: Blob) -> dict[str, Any]:
    """An entry of a tree, as the Hub lists it."""
    entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.lfs:
        size = len(pointer(blob.sha256, blob.size))
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": size}
    return entry
