"""Where the image files lie that rows name: inside one folder, whatever the rows say."""

from dataclasses import dataclass, replace
from pathlib import Path

from trainers.storage.paths import path_inside


@dataclass(frozen=True)
class ImageFolder:
    """
    A folder of image files that rows name by relative or absolute paths.

    People write such names in three ways: as seen from the folder, as seen from the file with the rows, and with the folder's own name first.
    The first of these by which the first row's image is found holds for all rows, see [`settled`].

    Attributes:
        root: the folder; a name that leads out of it, also by a link, is refused.
        origins: where relative names may begin.
    """

    root: Path
    origins: tuple[Path, ...]

    @classmethod
    def beside(cls, root: Path, file: Path) -> "ImageFolder":
        """Of the rows in `file`."""
        return cls(root, tuple(dict.fromkeys((root, file.parent, Path(root.absolute()).parent))))

    def settled(self, name: str) -> "ImageFolder":
        """The same folder with one origin: the first from which there is a file `name`, else the folder itself."""
        found = next((origin for origin in self.origins if self._lies_inside(origin / name)), self.root)
        return replace(self, origins=(found,))

    def find(self, name: str) -> Path:
        """
        The file that a row calls `name`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it lies outside of the folder.
        """
        path = path_inside(self.root, str(self.origins[0].absolute() / name))
        if not path.is_file():  # a pipe or a device is none: reading it could wait for ever
            raise FileNotFoundError(f"there is no file {self.origins[0] / name}")
        return path

    def _lies_inside(self, path: Path) -> bool:
        try:
            return path_inside(self.root, str(path.absolute())).is_file()
        except ValueError:
            return False
