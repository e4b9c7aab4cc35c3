"""Brings an index up to date with its folder: only what is new or has changed is read, and only new content is embedded."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lancedb.index import FTS
from transformers import BatchFeature

from modeling_proclip.images import BrokenImage, decode_image
from trainers.compute.precision import unit_length
from trainers.compute.quantization import Precision, Quantization
from trainers.display.progress import Progress
from trainers.evaluation.scoring.encoders import Encoder, join_images
from trainers.storage.locks import only_writer

from .folder import Folder, ImageFile
from .image_facts import caption_of, checksum, date_taken, thumbnail
from .table import LOCK_FILE, SETTINGS_FILE, ImageIndex, any_of, check_place


# Images of a step that is on the disk as a whole: what a killed run can lose.
STEP_SIZE = 256
# From so many images on, a search goes through an approximate index. Below, comparing with every embedding takes milliseconds.
APPROXIMATE_FROM = 50_000
# What changes an embedding by a rounding, and no search: an index outlives updates of the libraries.
_ROUNDING = ("device", "dtype", "versions")
# int8's ranges come from so many images, drawn evenly from the folder; an index that had fewer than the second number is made anew when
# there are more (sentence-transformers warns below it).
CALIBRATION_SIZE, MIN_CALIBRATED = 256, 100
_OF_CONTENT = ["checksum", "width", "height", "taken", "thumbnail", "embedding"]


@dataclass
class UpdateSummary:
    """What an update found and did, in images, and the files that no image could be read from with the reason."""

    total: int = 0
    unchanged: int = 0
    embedded: int = 0
    reused: int = 0  # moved, copied or touched files, whose content was embedded before
    removed: int = 0
    duplicates: int = 0  # images whose content another image of the index has too
    num_links: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Read:
    """A file that was read: its content hash, and where that is new the image as the model takes it and what is kept of it, or why there is none.
    Decoded, the photographs of a step would take gigabytes.
    """

    file: ImageFile
    checksum: str = ""
    image: BatchFeature | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None


def index_folder(
    path: Path,
    folder: Path,
    model: str,
    encoder: Encoder,
    batch_size: int = 32,
    progress: bool = False,
    truncate_dim: int | None = None,
    precision: Precision | None = None,
    on_step: Callable[[int, int], object] = lambda done, total: None,
) -> tuple[ImageIndex, UpdateSummary]:
    """Bring the index at `path` up to date with the images in `folder`; it is made if it is not there. Stopped in the middle, it keeps what was
    done, and the same call does the rest.

    Args:
        model: what `encoder` was loaded from, for those who search.
        encoder: embeds the images.
        batch_size: images that are embedded together.
        progress: show a bar.
        truncate_dim: keep only the first so many dimensions of the embeddings; by default as the index has them, and all in a new one.
        precision: of the stored embeddings, see [`Quantization`]; by default as the index has it, and float32 in a new one.
        on_step: called with the number of images that are done and that are to do, at the start and after each step.

    Raises:
        NotADirectoryError: If there is no such folder.
        FileExistsError: If `path` holds other files.
        ValueError: If the index is of another folder, model (names what differs), size or precision, the model's embeddings are shorter than
            `truncate_dim`, or another process is writing the index.
    """
    folder = Folder(folder).root.resolve()
    check_place(path)
    refusal = f"{path} is being written by another process: wait until it has finished, then repeat the command"
    with only_writer(path, refusal, file=LOCK_FILE):
        if (path / SETTINGS_FILE).exists():
            index = ImageIndex(path, to_write=True)
            if index.folder != folder:
                raise ValueError(f"{path} is the index of {index.folder}, not of {folder}: choose another --output")
            check_model(index, encoder)
            asked = index.dim if truncate_dim is None else truncate_dim, precision or index.precision
            if asked != (index.dim, index.precision):
                raise ValueError(
                    f"{path} holds embeddings of {index.dim} dimensions in {index.precision}, not of {asked[0]} in {asked[1]}: leave size and "
                    "precision out, or index the folder again with another --output"
                )
        else:
            encoder.check_truncate_dim(truncate_dim)
            dim = truncate_dim or encoder.embedding_dim
            index = ImageIndex.create(path, folder, model, identity_of(encoder), dim, precision or "float32")
        return index, _Update(index, encoder, batch_size).run(progress, on_step)


def identity_of(encoder: Encoder) -> dict[str, Any]:
    """What decides an image's embedding, but for [`_ROUNDING`]."""
    return {name: value for name, value in encoder.image_fingerprint().items() if name not in _ROUNDING}


def check_model(index: ImageIndex, encoder: Encoder) -> None:
    """ValueError if `encoder` does not make the embeddings of `index`; names what differs."""
    identity, recorded = identity_of(encoder), index.settings["identity"]
    names = {*identity, *recorded}.difference(_ROUNDING)
    differing = sorted(name for name in names if identity.get(name) != recorded.get(name))
    if differing:
        raise ValueError(
            f"{index.path} was made by a model other than {encoder.name} (they differ in {', '.join(differing)}): give the model that made it, "
            f"{index.settings['model']}, or index the folder again with another --output"
        )


class _Update:
    def __init__(self, index: ImageIndex, encoder: Encoder, batch_size: int):
        self.index, self.encoder, self.batch_size = index, encoder, batch_size
        self.folder, self.summary = Folder(index.folder), UpdateSummary()

    def run(self, progress: bool, on_step: Callable[[int, int], object]) -> UpdateSummary:
        waiting, gone = self._compare()
        if waiting and self.index.precision == "int8" and self.index.settings["num_calibrated"] < MIN_CALIBRATED:
            self._calibrate()
            waiting, gone = self._compare()
        done = 0
        on_step(done, len(waiting))
        with Progress("embedding images", len(waiting), "images", shown=progress) as bar:
            for step in self._read(waiting):
                self._write(step)
                bar.advance(len(step))
                done += len(step)
                on_step(done, len(waiting))
        # After what has moved was copied from them.
        for table, paths in zip((self.index.images, self.index.unreadable), gone):
            self.index.remove(table, paths)
        self.summary.removed = len(gone[0])
        self._finish()
        return self.summary

    def _compare(self) -> tuple[list[ImageFile], tuple[list[str], list[str]]]:
        """The files to read, and the paths that are no longer there, of images and of unreadable files."""
        known = self.index.rows(self.index.images, ["path", "checksum", "caption"]).to_pydict()
        captions: dict[str, str | None] = dict(zip(known["path"], known["caption"]))
        self.checksums: set[str] = set(known["checksum"])
        images, unreadable = (self.index.signatures(table) for table in (self.index.images, self.index.unreadable))
        present: set[str] = set()
        waiting: list[ImageFile] = []
        self.summary.unchanged = 0
        for file in self.folder.files():
            present.add(file.path)
            if images.get(file.path) == file.signature:
                if caption_of(self.index.folder / file.path) == captions[file.path]:
                    self.summary.unchanged += 1
                    continue
            elif unreadable.get(file.path) == file.signature:
                continue
            waiting.append(file)
        gone_images, gone_files = ([path for path in some if path not in present] for some in (images, unreadable))
        return waiting, (gone_images, gone_files)

    def _calibrate(self) -> None:
        """Takes int8's ranges from images all over the folder, which are embedded for it once more. What had other ranges leaves the index."""
        files = list(self.folder.files())
        stride = max(1, len(files) // CALIBRATION_SIZE)
        reads = (self._read_one(file, decode=True) for start in range(stride) for file in files[start::stride])
        images = list(islice((read.image for read in reads if read.image is not None), CALIBRATION_SIZE))
        if images:
            self.index.calibrate(Quantization.calibrated("int8", self._embeddings(images)), len(images))

    def _read(self, files: Sequence[ImageFile]) -> Iterator[list[_Read]]:
        """The files, read and decoded a batch ahead in other threads, in steps."""
        with ThreadPoolExecutor() as pool:
            reads: deque[Future[_Read]] = deque()
            step: list[_Read] = []
            for file in files:
                reads.append(pool.submit(self._read_one, file))
                if len(reads) > 2 * self.batch_size:
                    step.append(reads.popleft().result())
                if len(step) == STEP_SIZE:
                    yield step
                    step = []
            step += [read.result() for read in reads]
            if step:
                yield step

    def _read_one(self, file: ImageFile, decode: bool = False) -> _Read:
        """Reads a file, and decodes it where its content is not in the index."""
        try:
            data = self.folder.read(file)
            content = checksum(data)
            if content in self.checksums and not decode:
                return _Read(file, content)
            image = decode_image(data)
        except OSError as error:
            return _Read(file, reason=error.strerror or str(error))
        except BrokenImage as error:
            return _Read(file, reason=str(error))
        facts: dict[str, Any] = {"checksum": content, "width": image.width, "height": image.height}
        facts |= {"taken": date_taken(data), "thumbnail": thumbnail(image)}
        return _Read(file, content, self.encoder.prepare_images([image]), facts)

    def _write(self, step: Sequence[_Read]) -> None:
        """Puts a step into the index: its images at once, then its unreadable files."""
        known = self._kept({read.checksum for read in step if read.reason is None and read.image is None})
        # The only file of that content was changed meanwhile, and its row with it.
        step = [
            self._read_one(read.file, decode=True)
            if read.reason is None and read.image is None and read.checksum not in known
            else read
            for read in step
        ]
        new = {read.checksum: read for read in step if read.image is not None}
        good, broken = ([read for read in step if (read.reason is None) is sound] for sound in (True, False))
        content = {**known, **self._embed(list(new.values()))}
        self.index.put(self.index.images, [self._row(read, content[read.checksum]) for read in good])
        self.index.remove(self.index.unreadable, [read.file.path for read in good])
        unreadable = [
            {**self.index.file_columns(read.file.path, read.file.signature), "reason": read.reason} for read in broken
        ]
        self.index.put(self.index.unreadable, unreadable)
        self.index.remove(self.index.images, [read.file.path for read in broken])
        self.checksums.update(new)
        self.summary.embedded += len(new)
        self.summary.reused += len(good) - len(new)

    def _kept(self, checksums: set[str]) -> dict[str, dict[str, Any]]:
        """What is kept of these contents, where the index has them."""
        if not checksums:
            return {}
        rows = self.index.rows(self.index.images, _OF_CONTENT, any_of("checksum", sorted(checksums)))
        return {row["checksum"]: row for row in rows.to_pylist()}

    def _embed(self, reads: Sequence[_Read]) -> dict[str, dict[str, Any]]:
        """The same of new contents."""
        if not reads:
            return {}
        codes = self.index.quantization.encode(
            self._embeddings([read.image for read in reads if read.image is not None])
        )
        return {read.checksum: {**read.facts, "embedding": row.tolist()} for read, row in zip(reads, codes)}

    def _embeddings(self, images: Sequence[BatchFeature]) -> torch.Tensor:
        """`(len(images), dim)` float32, of unit length, of the size that the index keeps."""
        batches = (images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size))
        return torch.cat(
            [unit_length(self.encoder.encode_images(join_images(batch))[:, : self.index.dim]) for batch in batches]
        )

    def _row(self, read: _Read, content: dict[str, Any]) -> dict[str, Any]:
        caption = caption_of(self.index.folder / read.file.path)
        name = Path(read.file.path).with_suffix("").as_posix()
        words = " ".join([caption or "", *name.replace("_", " ").replace("-", " ").split("/")])
        file = self.index.file_columns(read.file.path, read.file.signature)
        return {**file, **content, "caption": caption, "words": words}

    def _finish(self) -> None:
        """Merges the small files of the steps, and makes the indexes of words and, from [`APPROXIMATE_FROM`] images on, of embeddings: whatever
        of it is not done, as the run before may have been killed here.
        """
        images, summary = self.index.images, self.summary
        images.optimize()
        have = {config.name for config in images.list_indices()}
        if len(self.index) and "words_idx" not in have:
            images.create_index("words", config=FTS(stem=False, remove_stop_words=False))
        if len(self.index) >= APPROXIMATE_FROM and "embedding_idx" not in have:
            self.index.approximate()
        checksums = self.index.rows(images, ["checksum"])["checksum"].to_pylist()
        summary.total, summary.duplicates = len(checksums), len(checksums) - len(set(checksums))
        summary.num_links = self.folder.num_links
        found = self.index.rows(self.index.unreadable, ["path", "reason"]).to_pydict()
        summary.unreadable = sorted([*zip(found["path"], found["reason"]), *self.folder.unlisted])
