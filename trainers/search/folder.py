"""The image files of a folder, and how a changed one is told from one that was seen before."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class ImageFile:
    """A file that may hold an image.

    Args:
        path: from the folder, with `/` between its parts.
        signature: size in bytes, times of the last change of content and of the entry in nanoseconds, number of the entry on its disk. A program that copies a
            file can set the first time back, as `rsync -t`, `cp -p` and `tar` do, but not the second: equal signatures mean equal content.
    """

    path: str
    signature: tuple[int, int, int, int]


@dataclass
class Folder:
    """The image files below `root`, by suffix. Links are not followed, so nothing outside of it is read and no loop is entered.

    Args:
        root: the folder.
        num_links: links that were passed over, once the files have been listed.
        unlisted: folders that could not be listed, with the reason.

    Raises:
        NotADirectoryError: If `root` is no folder.
    """

    root: Path
    num_links: int = 0
    unlisted: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise NotADirectoryError(f"{self.root} is no folder: name the folder that holds the images")

    def files(self) -> Iterator[ImageFile]:
        """The image files in the order of their paths. Names that are no valid UTF-8 are passed over and listed in `unlisted`."""
        self.num_links, self.unlisted = 0, []
        suffixes = set(Image.registered_extensions())
        for parent, folders, names in os.walk(self.root, onerror=self._note_error):
            folders.sort()
            # os.walk lists links to folders as folders, and enters none.
            self.num_links += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
            for name in sorted(names):
                if name.startswith("._") or os.path.splitext(name)[1].lower() not in suffixes:
                    continue
                file = Path(parent, name)
                path = file.relative_to(self.root).as_posix()
                if file.is_symlink():
                    self.num_links += 1
                elif not _is_text(path):
                    self.unlisted.append((repr(path), "its name is no valid UTF-8"))
                elif file.is_file():  # and no pipe or device, which would keep a reader waiting
                    found = file.stat()
                    # The numbers of some file systems have all 64 bits.
                    entry = found.st_ino & (2**63 - 1)
                    yield ImageFile(path, (found.st_size, found.st_mtime_ns, found.st_ctime_ns, entry))

    def _note_error(self, error: OSError) -> None:
        self.unlisted.append((str(error.filename), error.strerror or str(error)))


def _is_text(path: str) -> bool:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
