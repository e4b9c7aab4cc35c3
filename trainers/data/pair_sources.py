"""Opens every layout of pictures with captions through `datasets`, with the pictures left undecoded."""

import glob
import os
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets


if TYPE_CHECKING:
    from .pairs import PairSource

TABLES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}  # suffix -> builder of `datasets`
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

NAMES = ("__key__", "__url__")  # what webdataset calls a row and its shard

# Shards that a table without files of its own is cut into to be streamed.
_MOST_SHARDS = 1024


@dataclass
class RawRows:
    """
    An opened source.

    Attributes:
        name: of the source, for messages.
        table: rows with the pictures undecoded: a `datasets.Dataset`, or a `datasets.IterableDataset` if it is streamed.
        image_columns: of a row's picture, the first that has one; empty if pictures are not read.
        text_columns: of a row's captions.
        teacher_text_columns: of what the teacher of stage 1 reads in their place; empty if it reads the captions.
        folder: where relative paths of pictures begin; None where there are none.
        files: file of each shard of `table`, where they are known; for messages.
        images: whether pictures are read.
        texts_are_files: whether a text is the path of a file that holds the captions, one a line.
    """

    name: str
    table: Any
    image_columns: list[str]
    text_columns: list[str]
    teacher_text_columns: list[str] = field(default_factory=list)
    folder: str | None = None
    files: list[str] | None = None
    texts_are_files: bool = False

    @property
    def columns_with_text(self) -> list[str]:
        """`text_columns` and `teacher_text_columns`, each column once."""
        return list(dict.fromkeys([*self.text_columns, *self.teacher_text_columns]))


def open_rows(source: "PairSource", *, images: bool = True, streaming: bool | None = None) -> RawRows:
    """
    Opens `source`.

    Args:
        source: what to read.
        images: False: leave the pictures' columns out.
        streaming: as the source says by default.

    Raises:
        FileNotFoundError: If there is nothing at that place, or no dataset of that name.
        ValueError: If a column or split is missing (lists those that are there) or the files are of no known layout.
    """
    streaming = source.streaming if streaming is None else streaming
    rows = RawRows(
        str(source.source),
        None,
        source.columns("image_column") if images else [],
        source.columns("text_columns"),
        source.columns("teacher_text_columns"),
    )
    try:
        _open_table(source, rows, streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{rows.name} is neither a file or folder nor a dataset that can be read: {error}"
        ) from error
    columns = rows.table.column_names or list(next(iter(rows.table), {}))
    _check_columns(rows, columns)
    rows.image_columns = [column for column in rows.image_columns if column in columns]
    heads = [*rows.image_columns, *dict.fromkeys(_head(column, columns) for column in rows.columns_with_text)]
    heads += [column for column in NAMES if column in columns]
    if rows.table.column_names:
        rows.table = rows.table.select_columns(heads)
    for column, feature in (rows.table.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows.table = rows.table.cast_column(column, datasets.Image(decode=False))
    return rows


def _open_table(source: "PairSource", rows: RawRows, streaming: bool) -> None:
    """Sets the table of `rows`, and what else the layout tells."""
    path, options = Path(source.source), {"split": source.split, "streaming": streaming}
    if any(character in source.source for character in "*?[") and not path.exists():
        files = sorted(glob.glob(source.source, recursive=True))
        if not files:
            raise FileNotFoundError(f"no file fits the pattern {source.source}")
        _open_files(source, rows, files, options)
    elif path.is_file():
        _open_files(source, rows, [str(path)], options)
    elif not path.is_dir() or source.data_files is not None:
        if path.is_absolute() and not path.is_dir():
            raise FileNotFoundError(f"there is no file or folder {path}")
        rows.table = datasets.load_dataset(
            source.source, source.name, data_files=_plain(source.data_files), revision=source.revision, **options
        )
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        _open_saved(source, rows, streaming)
    else:
        _open_folder(source, rows, path, options)


def _open_files(source: "PairSource", rows: RawRows, files: list[str], options: dict[str, Any]) -> None:
    """Files of one kind: shards of webdataset, or tables."""
    suffixes = {Path(file).suffix for file in files}
    if len(suffixes) > 1:
        raise ValueError(f"{rows.name} holds files of several kinds ({', '.join(sorted(suffixes))}): give one kind")
    (suffix,) = suffixes
    if source.split != "train":
        raise ValueError(f"{rows.name} is read as files, whose only split is 'train', not {source.split!r}")
    options = {**options, "data_files": {"train": files}}
    if suffix == ".tar":
        rows.table = datasets.load_dataset("webdataset", features=_webdataset_features(rows, files), **options)
    elif suffix in TABLES:
        if suffix == ".parquet" and not rows.image_columns:  # the pictures in it are not even read
            names = datasets.load_dataset("parquet", **{**options, "streaming": True}).column_names
            _check_columns(rows, names)
            options["columns"] = list(dict.fromkeys(_head(column, names) for column in rows.columns_with_text))
        rows.table = datasets.load_dataset(TABLES[suffix], **options)
        rows.folder = os.path.dirname(os.path.abspath(files[0]))
    else:
        raise ValueError(
            f"{rows.name}: pairs are read from .tar, {', '.join(TABLES)} files, not from {suffix or 'others'}"
        )
    rows.files = files


def _open_folder(source: "PairSource", rows: RawRows, path: Path, options: dict[str, Any]) -> None:
    """A folder of shards, of tables or of pictures."""
    inside = path / source.split if (path / source.split).is_dir() else path
    files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(inside) for name in names)
    suffixes = Counter(Path(file).suffix.lower() for file in files)
    pictures = [file for file in files if file.lower().endswith(PICTURES)]
    if suffixes[".tar"]:
        _open_files(source, rows, [file for file in files if file.endswith(".tar")], {**options, "split": "train"})
    elif pictures and any(os.path.basename(file) in METADATA for file in files):
        rows.table = datasets.load_dataset("imagefolder", data_dir=str(path), drop_labels=True, **options)
    elif pictures and suffixes[".txt"]:
        texts = {file[:-4]: file for file in files if file.endswith(".txt")}
        _table_of(
            rows,
            {"image": pictures, "text": [texts.get(os.path.splitext(p)[0]) for p in pictures]},
            options["streaming"],
        )
        rows.texts_are_files = True
    elif pictures:
        raise ValueError(
            f"{path} holds pictures but no captions: put a metadata.jsonl there (one line a picture: "
            '{"file_name": "a.jpg", "text": "..."}), or a .txt beside each picture'
        )
    elif not files:
        raise ValueError(f"{path} is empty")
    else:
        rows.table = datasets.load_dataset(str(path), **options)


def _open_saved(source: "PairSource", rows: RawRows, streaming: bool) -> None:
    """What `save_to_disk` of `datasets` wrote."""
    table = datasets.load_from_disk(source.source)
    if isinstance(table, datasets.DatasetDict):
        if source.split not in table:
            raise ValueError(f"{rows.name} has no split {source.split!r}; it has {', '.join(table)}")
        table = table[source.split]
    rows.table = table.to_iterable_dataset(min(max(len(table), 1), _MOST_SHARDS)) if streaming else table


def _table_of(rows: RawRows, columns: Mapping[str, list[Any]], streaming: bool) -> None:
    table = datasets.Dataset.from_dict(dict(columns))
    rows.table = table.to_iterable_dataset(min(len(table), _MOST_SHARDS)) if streaming else table


def _webdataset_features(rows: RawRows, files: list[str]) -> datasets.Features:
    """
    Types of the fields that are read, with which `datasets` takes shards whose pictures are of several kinds. The first members of the first
    shard tell which fields there are.
    """
    fields: dict[str, None] = {}
    with tarfile.open(files[0]) as shard:
        for member in islice(shard, 200):
            fields[os.path.basename(member.name).partition(".")[2]] = None
    _check_columns(rows, list(fields))
    features: dict[str, Any] = {
        column: datasets.Image(decode=False) for column in rows.image_columns if column in fields
    }
    for column in rows.columns_with_text:
        head = _head(column, fields)
        features[head] = datasets.Json() if head.rpartition(".")[2] in ("json", "jsn") else datasets.Value("string")
    return datasets.Features({**features, "__key__": datasets.Value("string"), "__url__": datasets.Value("string")})


def _check_columns(rows: RawRows, columns: Any) -> None:
    """ValueError if the table lacks a column that is to be read."""
    there = ", ".join(map(str, columns)) or "none"
    if rows.image_columns and not any(column in columns for column in rows.image_columns):
        names = " or ".join(map(repr, rows.image_columns))
        raise ValueError(f"{rows.name} has no column {names} for the pictures (image_column); its columns are {there}")
    for column in rows.columns_with_text:
        if _head(column, columns) not in columns:
            use = "captions (text_columns, or --column)"
            if column not in rows.text_columns:
                use = "texts that the teacher reads (teacher_text_columns)"
            raise ValueError(f"{rows.name} has no column {column!r} for the {use}; its columns are {there}")


def _head(column: str, columns: Any) -> str:
    """The column that `column` is, or reaches into: "json" of "json.caption"."""
    return column if column in columns else column.partition(".")[0]


def _plain(files: Any) -> Any:
    return files if files is None or isinstance(files, str) else list(files)
