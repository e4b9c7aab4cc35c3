"""What the page shows: an index, or two of the same folder side by side, brought up to date while people search."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

from trainers.evaluation.scoring.encoders import Encoder
from trainers.search.build import index_folder
from trainers.search.table import SETTINGS_FILE, ImageIndex


@dataclass
class Gallery:
    """An index, and the model that made it or will make it.

    Args:
        title: what people read above its results.
        path: of the index.
        encoder: the model, loaded.
        model: what `encoder` was loaded from.
        folder: the folder of images to bring the index up to date with; None leaves it as it is.
    """

    title: str
    path: Path
    encoder: Encoder
    model: str
    folder: Path | None = None

    def open(self) -> ImageIndex | None:
        """The index as it is now, or None if there is none yet."""
        return ImageIndex(self.path) if (self.path / SETTINGS_FILE).exists() else None


@dataclass
class Indexing:
    """Brings galleries up to date in a thread of its own.

    Attributes:
        status: how far it is, or what went wrong, in a sentence.
        running: whether the status can still change.
    """

    galleries: list[Gallery]
    status: str = ""
    running: bool = False
    _thread: threading.Thread | None = field(default=None, repr=False)

    def start(self) -> None:
        """Starts the thread, which ends with the process: a run that is cut off is finished by the next."""
        self.running, self.status = True, "Looking for new images"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until all is done."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            for gallery in self.galleries:
                if gallery.folder is not None:
                    self.status = f"{gallery.title}: looking for new images in {gallery.folder.name}"
                    self._index(gallery, gallery.folder)
            self.status = " · ".join(self._described(gallery) for gallery in self.galleries)
        except (ValueError, OSError, RuntimeError) as error:  # the last: of the database, or memory of a GPU
            self.status = f"Indexing stopped: {error}"
        finally:
            self.running = False

    def _index(self, gallery: Gallery, folder: Path) -> None:
        def show(done: int, total: int) -> None:
            self.status = f"{gallery.title}: {done:,} of {total:,} images indexed"

        index_folder(gallery.path, folder, gallery.model, gallery.encoder, on_step=show)

    @staticmethod
    def _described(gallery: Gallery) -> str:
        index = gallery.open()
        if index is None:
            return f"{gallery.title}: no images"
        unreadable = index.unreadable.count_rows()
        return f"{gallery.title}: {len(index):,} images" + (f", {unreadable:,} unreadable files" if unreadable else "")
