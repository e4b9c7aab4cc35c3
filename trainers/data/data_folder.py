"""Where the files lie that rows name: inside one folder, or on the web if the user says so, whatever the rows say."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import datasets
import fsspec
import huggingface_hub.constants

from trainers.storage.object_stores import is_address
from trainers.storage.paths import path_inside

from .remote_images import fetch_image


class NamedFiles(Protocol):
    """What rows may name: a [`DataFolder`], [`NoFiles`] or [`HubFiles`]."""

    def find(self, name: str) -> Path | bytes:
        """The file that a row calls `name`, or its content. OSError if there is no such file, ValueError if it is none that data may name."""


@dataclass(frozen=True)
class DataFolder:
    """A folder of files that rows name by relative or absolute paths.

    People write relative paths in three ways: as seen from the folder, as seen from the file with the rows, and with the folder's own name first.
    The first of these by which the first row's file is found holds for all rows, see [`settled`].

    Attributes:
        root: the folder; a name that leads out of it, also by a link, is refused.
        origins: where relative names may begin.
        remote: whether a name may be an address on the web (http and https).
    """

    root: Path
    origins: tuple[Path, ...]
    remote: bool = False

    @classmethod
    def of(cls, source: Path) -> "DataFolder":
        """A source that is a folder, or the folder of one that is a file."""
        root = (source if source.is_dir() else source.parent).absolute()
        return cls(root, (root,))

    @classmethod
    def beside(cls, root: Path, file: Path) -> "DataFolder":
        """The folders in which the rows of `file` may name files."""
        return cls(root, tuple(dict.fromkeys((root, file.parent, Path(root.absolute()).parent))))

    def settled(self, name: str) -> "DataFolder":
        """The same folder with one origin: the first from which there is a file `name`, else the folder itself."""
        found = next((origin for origin in self.origins if self._is_inside(origin / name)), self.origins[0])
        return replace(self, origins=(found,))

    def find(self, name: str) -> Path | bytes:
        """See [`NamedFiles`]."""
        if is_address(name):
            return _image_at(name, self.remote)
        path = path_inside(self.root, str(self.origins[0].absolute() / name))
        if not path.is_file():  # a pipe or a device is none: reading it could wait for ever
            raise FileNotFoundError(f"there is no file {self.origins[0] / name}")
        return path

    def _is_inside(self, path: Path) -> bool:
        try:
            return path_inside(self.root, str(path.absolute())).is_file()
        except ValueError:
            return False


@dataclass(frozen=True)
class NoFiles:
    """No file of this machine, for rows that lie in an object store.

    Attributes:
        remote: see [`DataFolder`].
    """

    remote: bool = False

    def find(self, name: str) -> bytes:
        """See [`NamedFiles`]."""
        if is_address(name):
            return _image_at(name, self.remote)
        raise ValueError(
            f"{name!r:.200} is the name of a file, and rows in an object store have none beside them: put the images into the rows or into "
            "shards, or name a local image_folder"
        )


def _image_at(address: str, remote: bool) -> bytes:
    """The image at an address that a row names; ValueError unless the user allows it with `remote`."""
    if not remote or not address.lower().startswith(("http://", "https://")):
        raise ValueError(
            f"{address!r:.200} is an address: only files are read, and with remote_images=True images at http and https addresses"
        )
    return fetch_image(address)


class LocalFiles:
    """All files of this computer, for rows that the user's own program has made."""

    def find(self, name: str) -> Path:
        """See [`NamedFiles`]."""
        if is_address(name):
            raise ValueError(f"{name!r:.200} is an address, and images are read from files only")
        if not Path(name).is_file():
            raise FileNotFoundError(f"there is no file {name}")
        return Path(name)


@dataclass(frozen=True)
class HubFiles:
    """The files of a dataset on the Hub: in its repository, from which a stream reads them, or where the library keeps what it fetched.

    Attributes:
        repository: name of the dataset.
    """

    repository: str

    def find(self, name: str) -> Path | bytes:
        """See [`NamedFiles`]."""
        if is_address(name):
            if not re.match(rf"(zip://[^:]*::)?hf://datasets/{re.escape(self.repository)}@", name):
                raise ValueError(f"{name!r:.200} lies outside of the dataset {self.repository}")
            with fsspec.open(name, "rb") as file:
                return file.read()
        caches = (huggingface_hub.constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
        inside = [
            Path(cache) for cache in map(os.path.realpath, caches) if os.path.realpath(name).startswith(cache + os.sep)
        ]
        if not inside:
            raise ValueError(f"{name!r:.200} lies outside of the dataset {self.repository}")
        return Path(name)
