"""The index on the disk: a LanceDB database of two tables, and a file that says which model and folder it is of.

photos.index/
    index.json          format, folder, model, what decides an embedding, its size, precision and ranges
    images.lance/       a row for every image
    unreadable.lance/   a row for every file that no image could be read from
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
from lancedb.index import IvfFlat, IvfSq

from trainers.compute.quantization import Precision, Quantization
from trainers.storage.files import TEMPORARY_SUFFIX, write_file


FORMAT = 1
SETTINGS_FILE, LOCK_FILE = "index.json", "index.lock"
_SIGNATURE = ["size", "mtime_ns", "ctime_ns", "entry"]
_PATHS_OF_A_CALL = 500


def _file_fields() -> list[pa.Field]:
    return [pa.field("path", pa.string(), nullable=False), *(pa.field(name, pa.int64()) for name in _SIGNATURE)]


def image_schema(dim: int, precision: Precision = "float32") -> pa.Schema:
    """The columns of an image. `taken` is text, so that `taken >= '2025-01-01'` compares dates; embeddings have unit length."""
    return pa.schema(
        [
            *_file_fields(),
            pa.field("checksum", pa.string()),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("taken", pa.string()),
            pa.field("caption", pa.string()),
            pa.field("words", pa.string()),  # of caption and file name, for search by words
            pa.field("thumbnail", pa.binary()),
            pa.field("embedding", _embedding_type(dim, precision)),
        ]
    )


def _embedding_type(dim: int, precision: Precision) -> pa.DataType:
    if precision == "binary":
        return pa.list_(pa.uint8(), Quantization(precision, dim).num_bytes)
    return pa.list_(pa.int8() if precision == "int8" else pa.float32(), dim)


UNREADABLE_SCHEMA = pa.schema([*_file_fields(), pa.field("reason", pa.string())])


class ImageIndex:
    """An index that is open.

    Args:
        path: its folder.
        to_write: make the tables that a run which was killed in its first moments had not made.

    Raises:
        FileNotFoundError: If there is no index; says how to make one.
        ValueError: If it is not an index of this release.
    """

    def __init__(self, path: Path, to_write: bool = False):
        self.path = path
        try:
            self.settings: dict[str, Any] = json.loads((path / SETTINGS_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(
                f"{path} is not an index of images: make one with `proclip index FOLDER --model MODEL --output {path}`"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{path / SETTINGS_FILE} is damaged ({error}): delete {path} and index the folder again"
            ) from error
        if not isinstance(self.settings, dict) or self.settings.get("format") != FORMAT:
            raise ValueError(
                f"{path} is not an index of this release (format {FORMAT}): delete it and index the folder again"
            )
        database = lancedb.connect(str(path))
        if to_write:
            database.create_table("images", schema=image_schema(self.dim, self.precision), exist_ok=True)
            database.create_table("unreadable", schema=UNREADABLE_SCHEMA, exist_ok=True)
        try:
            self.images, self.unreadable = database.open_table("images"), database.open_table("unreadable")
        except ValueError as error:
            raise ValueError(f"{path} has a table missing: repeat `proclip index`, which was stopped early") from error

    @classmethod
    def create(
        cls,
        path: Path,
        folder: Path,
        model: str,
        identity: dict[str, Any],
        dim: int,
        precision: Precision = "float32",
    ) -> "ImageIndex":
        """A new, empty index at `path`, of embeddings of `dim` dimensions. `identity` is what decides an embedding."""
        # First, so that whoever finds the tables knows that they belong to an index.
        settings = {"format": FORMAT, "folder": str(folder), "model": model, "dim": dim, "identity": identity}
        settings |= {"precision": precision, "ranges": None, "num_calibrated": 0}
        write_file(path / SETTINGS_FILE, json.dumps(settings, indent=2).encode())
        return cls(path, to_write=True)

    @property
    def dim(self) -> int:
        """Dimensions of an embedding."""
        return self.settings["dim"]

    @property
    def precision(self) -> Precision:
        """What the stored embeddings are rounded to; earlier releases wrote float32 alone and did not say so."""
        return self.settings.get("precision", "float32")

    @property
    def quantization(self) -> Quantization:
        """How embeddings are stored; of int8 after [`calibrate`]."""
        return Quantization.from_dict({"ranges": None, "precision": "float32", **self.settings})

    def calibrate(self, quantization: Quantization, num_calibrated: int) -> None:
        """Empty the index, which is to be of `quantization` from now on, with the ranges of `num_calibrated` images."""
        self.images.delete("true")
        self.settings |= {**quantization.to_dict(), "num_calibrated": num_calibrated}
        write_file(self.path / SETTINGS_FILE, json.dumps(self.settings, indent=2).encode())

    @property
    def folder(self) -> Path:
        """The folder whose images are indexed."""
        return Path(self.settings["folder"])

    def __len__(self) -> int:
        return self.images.count_rows()

    def rows(self, table: Any, columns: Sequence[str], where: str | None = None) -> pa.Table:
        """Those `columns` of all rows of `table`, or of those that the SQL expression `where` holds for."""
        query = table.search().select(list(columns))
        return (query.where(where) if where else query).limit(None).to_arrow()

    def signatures(self, table: Any) -> dict[str, tuple[int, ...]]:
        """Path -> signature of every row of `table`."""
        found = self.rows(table, ["path", *_SIGNATURE]).to_pydict()
        return dict(zip(found["path"], zip(*(found[name] for name in _SIGNATURE))))

    def approximate(self) -> None:
        """Build the approximate index of float32 or binary embeddings. The database cannot compare int8 ones, which are searched exactly."""
        if self.precision != "int8":
            binary = self.precision == "binary"
            config = IvfFlat(distance_type="hamming") if binary else IvfSq(distance_type="cosine")
            self.images.create_index("embedding", config=config)

    @staticmethod
    def file_columns(path: str, signature: Sequence[int]) -> dict[str, Any]:
        """The columns that say which file a row is of."""
        return {"path": path, **dict(zip(_SIGNATURE, signature, strict=True))}

    @staticmethod
    def put(table: Any, rows: Sequence[dict[str, Any]]) -> None:
        """Writes `rows` in one step, in place of those of the same paths."""
        if rows:
            data = pa.Table.from_pylist(list(rows), schema=table.schema)
            table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all().execute(data)

    @staticmethod
    def remove(table: Any, paths: Sequence[str]) -> None:
        """Removes the rows of `paths`."""
        for start in range(0, len(paths), _PATHS_OF_A_CALL):
            table.delete(any_of("path", paths[start : start + _PATHS_OF_A_CALL]))


def any_of(column: str, values: Sequence[str]) -> str:
    """The SQL expression that holds where `column` is one of `values`."""
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({quoted})"


def check_place(path: Path) -> None:
    """FileExistsError if there is something at `path` that an index would be written over or among."""
    if (path / SETTINGS_FILE).exists() or not path.exists():
        return
    # A killed run may have left these two.
    if not path.is_dir() or any(
        file.name not in (LOCK_FILE, SETTINGS_FILE + TEMPORARY_SUFFIX) for file in path.iterdir()
    ):
        raise FileExistsError(
            f"{path} is a file, or a folder with other files: give a new or empty folder, or an index"
        )
