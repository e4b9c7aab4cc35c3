"""The image files of a folder, and how a changed one is told from one that was seen before."""

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image


# A larger file is not read: cameras' raw files are a tenth of it.
MAX_FILE_BYTES = 1 << 30


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
    """The image files below `root`, by suffix. Links are not followed, so nothing outside it is read and there are no loops.

    Args:
        root: the folder.
        num_links: links that were skipped, once the files have been listed.
        unlisted: folders that could not be listed, with the reason.

    Raises:
        NotADirectoryError: If `root` is not a folder.
    """

    root: Path
    num_links: int = 0
    unlisted: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise NotADirectoryError(f"{self.root} is not a folder: give the folder that holds the images")

    def files(self) -> Iterator[ImageFile]:
        """The image files in the order of their paths. Names that are not valid UTF-8 are skipped and listed in `unlisted`."""
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
                try:
                    found = file.lstat()
                except OSError as error:  # deleted meanwhile, or its folder may be listed and not entered
                    self._note_error(error)
                    continue
                if stat.S_ISLNK(found.st_mode):
                    self.num_links += 1
                elif not _is_text(path):
                    self.unlisted.append((path, "its name is not valid UTF-8"))
                elif stat.S_ISREG(found.st_mode):  # and no pipe or device, which would keep a reader waiting
                    # The numbers of some file systems have all 64 bits.
                    entry = found.st_ino & (2**63 - 1)
                    yield ImageFile(path, (found.st_size, found.st_mtime_ns, found.st_ctime_ns, entry))

    def read(self, file: ImageFile) -> bytes:
        """The content of `file`.

        Raises:
            OSError: If it cannot be read, has become a link or is larger than [`MAX_FILE_BYTES`].
        """
        path = self.root / file.path
        with open(path, "rb", opener=_open_no_link) as opened:
            if (size := os.fstat(opened.fileno()).st_size) > MAX_FILE_BYTES:
                raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than {MAX_FILE_BYTES:,}", str(path))
            return opened.read()

    def _note_error(self, error: OSError) -> None:
        path = os.path.relpath(error.filename, self.root)
        self.unlisted.append((path, error.strerror or str(error)))


def printable(path: str) -> str:
    """`path` on one line: what moves the cursor, and bytes that are no UTF-8, as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in path)


def _open_no_link(path: str, flags: int) -> int:
    # Windows has neither flag. O_NONBLOCK: opening a pipe would wait for its writer.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _is_text(path: str) -> bool:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
