"""Finds the rows of a source, whatever its layout: files that are read here, or a dataset that `datasets` reads from the Hub or saved to disk."""

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from trainers.storage.object_stores import is_address, list_remote

from .archives import ENDINGS, TarShard, is_shard
from .copies import copied_rows, read_rows
from .data_folder import DataFolder, HubFiles, NamedFiles, NoFiles
from .folders import (
    METADATA,
    captions_beside,
    check_inside,
    declared_files,
    files_of_split,
    is_image,
    labels_of,
    list_files,
    matching_files,
    split_of,
)
from .pair_source import PairSource
from .shards import ImageTable, RemoteShard, Shard
from .tables import KINDS, TableFile, check_arrow_end, kind_of


logger = logging.getLogger(__name__)

# Shards that a table without files of its own is cut into to be streamed.
_MOST_SHARDS = 1024
# Files beside the data that are none of it.
_NO_TABLES = ("readme", "license", "dataset_info", "dataset_dict", "state.json", "config.json")


@dataclass
class FoundRows:
    """Rows that were found and not read yet: those of `shards`, or of `table`.

    Attributes:
        table: what `datasets` has opened, or a list of the images of a folder.
        files: what rows may name.
        text_files: columns of `table` that hold paths of files with captions.
        num_images: how many images lie in the folder, where a metadata file says which are read.
    """

    name: str
    shards: Sequence[Shard] = ()
    table: Any = None
    files: NamedFiles | None = None
    text_files: tuple[str, ...] = ()
    num_images: int = 0

    def columns(self, wanted: Sequence[str] = ()) -> list[str]:
        """Names of the columns. Empty files of lines have none. ValueError if one of the others lacks a column `wanted` that the first
        one has.
        """
        if not self.shards:
            return list(self.table.column_names or next(iter(self.table), {}))
        first, columns = self.shards[0], dict.fromkeys(self.shards[0].columns())
        for shard in self.shards[1:]:
            if is_shard(shard.path):  # a later one may begin with another kind of image
                if all(column in columns for column in wanted):
                    break
                columns |= dict.fromkeys(shard.columns())
            elif isinstance(shard, RemoteShard) and columns:
                break  # each is checked when it is downloaded
            elif there := shard.columns():  # an empty file of lines has none
                if not columns:
                    first, columns = shard, dict.fromkeys(there)
                missing = [column for column in wanted if column in columns and column not in there]
                if missing:
                    raise ValueError(
                        f"{shard.path} has no column {missing[0]!r}, which {first.path} has; its columns are {', '.join(there)}"
                    )
        return list(columns)

    def rows(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """The rows as they come, with `columns`."""
        return read_rows(self.shards, columns) if self.shards else iter(self._selected(columns))

    def by_number(self, columns: list[str]) -> datasets.Dataset:
        """The rows by number; those of files are copied once, see [`copied_rows`]."""
        table = _undecoded(copied_rows(self.shards, columns)) if self.shards else self._selected(columns)
        if len(table) < self.num_images:
            logger.warning(
                "%s: at least %s of %s images have no row", self.name, self.num_images - len(table), self.num_images
            )
        return table

    def stream(self, columns: list[str]) -> datasets.IterableDataset:
        """The rows as a stream of `datasets`, which has shards."""
        if self.shards:
            return datasets.IterableDataset.from_generator(
                read_rows, gen_kwargs={"shards": list(self.shards), "columns": tuple(columns)}
            )
        table = self._selected(columns)
        if isinstance(table, datasets.Dataset):
            table = table.to_iterable_dataset(min(max(len(table), 1), _MOST_SHARDS))
        return table

    def _selected(self, columns: list[str]) -> Any:
        return _undecoded(self.table.select_columns(columns) if self.table.column_names else self.table)


def _undecoded(table: Any) -> Any:
    """`table` with images as they are stored."""
    for column, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            table = table.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return table


def find_rows(source: PairSource, *, streaming: bool, any_split: bool = False) -> FoundRows:
    """Finds the rows of `source`. Of its columns, only the name of the image's and those of texts are looked at.

    Args:
        streaming: whether a dataset on the Hub is opened as a stream.
        any_split: whether a file, or what was saved without the name of a split, is taken for whatever split is asked for: a copy of that split.

    Raises:
        FileNotFoundError: If there is nothing at that place, or no dataset of that name.
        ValueError: If the split is missing (lists those that are there) or the files are of no known layout.
    """
    place = source.source
    path = Path(place)
    if is_address(place):
        return _remote(source, any_split)
    if any(character in place for character in "*?[") and not path.exists():
        files = [file for file in sorted(glob.glob(place, recursive=True)) if os.path.isfile(file)]
        if not files:
            raise FileNotFoundError(f"no file fits the pattern {place}")
        return _files(source, files, any_split)
    if path.is_file():
        return _files(source, [place], any_split)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _saved(source, path, any_split)
        return _folder(source, path)
    if path.exists():
        raise ValueError(f"{place} is neither a file nor a folder, but a pipe or a device")
    if path.is_absolute() or kind_of(place) or is_shard(place):
        raise FileNotFoundError(f"there is no file {place}" if path.suffix else f"there is no file or folder {place}")
    return _on_the_hub(source, streaming)


def _remote(source: PairSource, any_split: bool) -> FoundRows:
    """Tables or shards at an address: a file, a pattern of files, or all that lie below a folder."""
    place, files = source.source, list_remote(source.source)
    folder = place.rstrip("/") + "/"
    if all(file.url.startswith(folder) for file in files):
        by_name = {file.url.removeprefix(folder): file for file in files}
        names = [name for name in by_name if not any(part.startswith((".", "__")) for part in name.split("/"))]
        if source.data_files is not None:
            names = matching_files(names, _as_list(source.data_files), place)
        else:
            names = [name for name in names if is_shard(name)] or _tables(names, place)
            if not names:
                raise ValueError(f"{place} holds no {', '.join(ENDINGS)} and no table: pack images into shards")
            names = files_of_split(names, source.split, place, names=True)
        files = [by_name[name] for name in names]
    else:
        _check_only_split(source, any_split)
        names = [file.name for file in files]
    _check_kinds(source, [file.url for file in files])
    texts = tuple(column.lower() for column in source.columns("text_columns"))
    shards = [
        RemoteShard(
            TarShard(file.url, texts, name) if is_shard(name) else TableFile(file.url, source.split, name),
            file,
        )
        for file, name in zip(files, names, strict=True)
    ]
    if source.image_folder is None:
        return FoundRows(place, shards, files=NoFiles(source.remote_images))
    return FoundRows(place, shards, files=_named_files(source, Path(source.image_folder), Path(source.image_folder)))


def _files(source: PairSource, files: Sequence[str], any_split: bool) -> FoundRows:
    """Files that the user names."""
    declares_splits = len(files) == 1 and kind_of(files[0]) == "json" and TableFile(files[0]).declares_splits()
    if not declares_splits:
        _check_only_split(source, any_split)
    root = Path(os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files]))
    names = [os.path.basename(file) if len(files) == 1 else os.path.relpath(file, root) for file in files]
    return _shards(source, root, list(files), names)


def _check_only_split(source: PairSource, any_split: bool) -> None:
    if not any_split and source.split != "train":
        raise ValueError(f"{source.source} is read as files, whose only split is 'train', not {source.split!r}")


def _check_kinds(source: PairSource, files: Sequence[str]) -> None:
    """ValueError unless all files are shards, or tables of one kind."""
    kinds = {kind_of(file) for file in files}
    if all(map(is_shard, files)) or (None not in kinds and len(kinds) == 1):
        return
    endings = sorted({Path(file).suffix.lower() or "no ending" for file in files})
    if len(endings) > 1:
        raise ValueError(f"{source.source} holds files of several kinds ({', '.join(endings)}): give one kind")
    known = [*ENDINGS, *(ending for some in KINDS.values() for ending in some)]
    raise ValueError(
        f"{source.source} is of an unknown kind: rows are read from {', '.join(known)} files, not from {endings[0]}"
    )


def _shards(source: PairSource, root: Path, files: Sequence[str], names: Sequence[str]) -> FoundRows:
    """Files of one kind: shards, or tables whose rows may name images inside of `root`."""
    _check_kinds(source, files)
    if is_shard(files[0]):
        texts = tuple(column.lower() for column in source.columns("text_columns"))
        return FoundRows(source.source, [TarShard(file, texts, name) for file, name in zip(files, names, strict=True)])
    shards: list[Shard] = []
    for file, name in zip(files, names, strict=True):
        table = TableFile(file, source.split, name)
        if os.path.dirname(os.path.abspath(file)) == str(root) or source.image_folder is not None:
            shards.append(table)
        else:
            columns = {column: column for column in table.columns()}
            shards.append(ImageTable(table, str(root), columns, tuple(source.columns("image_column"))))
    return FoundRows(source.source, shards, files=_named_files(source, root, Path(files[0])))


def _as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _named_files(source: PairSource, root: Path, file: Path) -> DataFolder:
    if source.image_folder is None:
        return DataFolder(root, (root,), source.remote_images)
    folder = Path(source.image_folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"image_folder: there is no folder {folder}")
    return DataFolder(folder, DataFolder.beside(folder, file).origins, source.remote_images)


def _folder(source: PairSource, path: Path) -> FoundRows:
    """A folder of shards, of tables or of images."""
    name, split = source.source, source.split
    files = list_files(path)
    if not files:
        raise ValueError(f"{name} is empty")
    patterns = source.data_files and _as_list(source.data_files)
    patterns = patterns or declared_files(path, source.name, split)
    chosen = files if patterns is None else matching_files(files, patterns, name)
    shards = [file for file in chosen if is_shard(file)]
    images = [file for file in chosen if is_image(file)]
    if shards and images:
        logger.warning(
            "%s: shards are read, and %s images such as %s beside them are not", name, f"{len(images):,}", images[0]
        )
        images = []
    tables = [] if shards or images else _tables(chosen, name)
    if not shards and not images and not tables:
        raise ValueError(f"{name} holds no data that is read here: no {', '.join(ENDINGS)}, no table, no images")
    data = shards or images or tables
    if patterns is None:
        data = files_of_split(data, split, name, names=not images)
    if images:
        return _images(source, path, data, files)
    for file in data:
        check_inside(path, file)
    return _shards(source, path.absolute(), [str(path / file) for file in data], data)


def _tables(files: Sequence[str], where: str) -> list[str]:
    """The tables among `files`: Parquet, as on the Hub, with what lies beside, or else the only kind that is there."""
    by_kind: dict[str, list[str]] = {}
    for file in files:
        kind, name = kind_of(file), os.path.basename(file).lower()
        if kind and not name.startswith(_NO_TABLES) and not name.endswith("_stats.json"):
            by_kind.setdefault(kind, []).append(file)
    if len(by_kind) > 1:
        by_kind.pop("text", None)
    for kind in ("parquet", "arrow"):
        if kind in by_kind:
            files = by_kind.pop(kind)
            for some in by_kind.values():
                logger.warning(
                    "%s: .%s files are read, and %s such as %s are not", where, kind, f"{len(some):,} files", some[0]
                )
            return files
    if len(by_kind) > 1:
        found = ", ".join(some[0] for some in by_kind.values())
        raise ValueError(f"{where} holds tables of several kinds ({found}): name one of them, or a pattern")
    return next(iter(by_kind.values()), [])


def _images(source: PairSource, path: Path, images: list[str], files: Sequence[str]) -> FoundRows:
    """Images with a metadata file, with captions beside them, or in folders that are classes."""
    root = path if source.image_folder is None else Path(source.image_folder)
    named = DataFolder(root.absolute(), (path.absolute(),), source.remote_images)
    metadata = [file for file in files if os.path.basename(file).lower() in METADATA]
    if metadata:
        for file in metadata:
            check_inside(path, file)
        twice = [folder for folder, count in Counter(map(os.path.dirname, metadata)).items() if count > 1]
        if twice:
            raise ValueError(
                f"{path / twice[0]} has several metadata files ({', '.join(METADATA)}), which may say different things: leave one"
            )
        below = source.split + os.sep if all(file.startswith(source.split + os.sep) for file in images) else ""
        splits = tuple(dict.fromkeys(split_of(file, names=False) for file in images))
        shards = [
            _metadata(path.absolute(), file, below, splits)
            for file in metadata
            if (file.startswith(below) or os.sep not in file) and split_of(file, names=False) in (None, *splits)
        ]
        return FoundRows(source.source, shards, files=named, num_images=len(images))
    columns: dict[str, Any] = captions_beside(images, files, source.source)
    features: dict[str, Any] = {name: datasets.Value("string") for name in columns}
    labels = labels_of(images, [file for file in files if is_image(file)])
    if labels is not None and len(columns) == 1:
        columns["label"], features["label"] = labels[0], datasets.ClassLabel(names=labels[1])
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return FoundRows(source.source, table=table, files=named, text_files=("text", "json"))


def _metadata(path: Path, file: str, below: str, splits: tuple[str | None, ...]) -> ImageTable:
    table = TableFile(str(path / file), name=file)
    names: dict[str, str] = {}
    for own in table.columns():
        name = "image" if own == "file_name" else own.removesuffix("_file_name")
        if name in names:
            raise ValueError(
                f"{path / file} has both {names[name]!r} and {own!r}, which name the same column {name!r}"
            )
        names[name] = own
    images = tuple(name for name, own in names.items() if name != own)
    if not images:
        raise ValueError(f"{path / file} has no column 'file_name' for the images; its columns are {', '.join(names)}")
    return ImageTable(table, str(path), names, images, below, splits)


def _saved(source: PairSource, path: Path, any_split: bool) -> FoundRows:
    """What `save_to_disk` of `datasets` wrote."""
    try:
        for file in path.rglob("*.arrow"):
            check_arrow_end(file)
        table = datasets.load_from_disk(str(path))
    except IndexError as error:  # what `datasets` makes of a dataset that was saved without rows
        raise ValueError(f"{source.source} has no rows") from error
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise ValueError(f"{source.source} cannot be read as a dataset that was saved: {error}") from error
    if isinstance(table, datasets.DatasetDict):
        if source.split not in table:
            raise ValueError(f"{source.source} has no split {source.split!r}; it has {', '.join(table)}")
        table = table[source.split]
    else:
        split = None if table.split is None else str(table.split).partition("[")[0]  # "train[:100]" is of "train"
        if source.split != (split or "train") and not (any_split and split is None):
            raise ValueError(f"{source.source} has no split {source.split!r}; it has {split or 'train'}")
    return FoundRows(source.source, table=table, files=_named_files(source, path.absolute(), path / "state.json"))


def _on_the_hub(source: PairSource, streaming: bool) -> FoundRows:
    files = [source.data_files] if isinstance(source.data_files, str) else source.data_files
    for file in files or ():  # as of a file on this computer, or elsewhere
        elsewhere = "://" in file or "::" in file or os.path.isabs(file) or ".." in Path(file).parts
        if elsewhere or "/" not in source.source:
            raise ValueError(
                f"{file!r:.200} is not the name of a file within a dataset owner/name on the Hub, here {source.source}"
            )
    try:
        table = datasets.load_dataset(
            source.source,
            source.name,
            data_files=None if files is None else {source.split: list(files)},
            revision=source.revision,
            split=source.split,
            streaming=streaming,
        )
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source.source} is neither a file or folder nor a dataset that can be read: {error}"
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:  # a damaged file, say
        raise ValueError(f"{source.source} cannot be read: {error.__cause__ or error}") from error
    return FoundRows(source.source, table=table, files=HubFiles(source.source))
