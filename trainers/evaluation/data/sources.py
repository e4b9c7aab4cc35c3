"""Opens the data of a benchmark and checks it against the manifest: a wrong count, column or label is an error, not a number."""

import dataclasses
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import regex

from trainers.data.archives import BROKEN
from trainers.data.copies import PLACE, rows_in_memory
from trainers.data.data_folder import DataFolder, NamedFiles
from trainers.data.folders import IMAGES
from trainers.data.pair_source import PairSource
from trainers.data.pair_sources import missing_column
from trainers.data.sources import find_rows
from trainers.data.tables import KINDS, Placed, Row, TableFile, kind_of, value_at
from trainers.data.text_lines import read_lines
from trainers.storage.paths import path_inside

from .manifest import Classes, Data, Manifest, resource_lines


_SECONDS_FOR_EDITS = 10  # of all class names: an expression from somebody else may backtrack for years


@dataclass
class OpenedData:
    """The rows of one benchmark, checked as far as can be without reading an image.

    Attributes:
        rows: the dataset; images are not decoded.
        source: where the rows were read: the manifest's source, or the local copy that replaced it.
        folder: that local copy, None for the Hub.
        limit: how many of the rows were drawn, None for all.
        revision: commit on the Hub, if known.
        num_train: how many of the rows, the first, a linear probe is trained on; the others test it.
        files: what the rows may name.
        where: what messages call the benchmark.
    """

    rows: datasets.Dataset
    source: str
    folder: Path | None
    limit: int | None = None
    revision: str | None = None
    num_train: int = 0
    files: NamedFiles | None = None
    where: str = ""

    def row_name(self, row: int) -> str:
        """What messages call the row of that number: by its place in its file, where that is known."""
        return f"{self.where}, {self.rows[row][PLACE] if PLACE in self.rows.column_names else f'row {row}'}"


def open_data(
    manifest: Manifest, local: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> OpenedData:
    """Opens the rows of `manifest`.

    Args:
        local: a local copy in place of the manifest's source: a file or folder in any layout that training reads, or in the manifest's.
        limit: draw only so many rows, by `seed`. The results are then of a part, and say so.

    Raises:
        ValueError: If a column is missing, the number of rows is not the manifest's, or there are none. Names the benchmark.
        OSError: If the source cannot be read.
    """
    if manifest.train is not None:
        test = open_data(dataclasses.replace(manifest, train=None), local, limit, seed)
        train = open_data(dataclasses.replace(manifest, train=None, data=manifest.train), local)
        rows = datasets.concatenate_datasets([train.rows, test.rows])
        return dataclasses.replace(test, rows=rows, num_train=len(train.rows))
    data, where = manifest.data, f"benchmark {manifest.name}"
    source = str(local or data.source)
    folder = Path(source) if Path(source).exists() else None
    files: NamedFiles | None = None if folder is None else DataFolder.of(folder)
    if local is not None and folder is None:
        raise FileNotFoundError(f"{where}: there is no {source}")
    if data.layout == "openmoji" and local is None:
        from trainers.openmoji.rows import openmoji_rows

        rows = openmoji_rows(data.config or "")
    elif data.layout == "caption_folder":
        rows = _caption_folder(_local(folder, source, where), manifest)
    elif data.layout == "mmvp":
        rows = _mmvp(_local(folder, source, where), where)
    elif data.layout == "caption_file":
        rows = _caption_file(_local(folder, source, where), manifest)
    else:
        rows, files = _table(source, folder, manifest, where)
    missing = [column for column in manifest.columns.values() if column not in rows.column_names]
    if missing:
        raise missing_column(f"{where}: {source}", missing[0], [name for name in rows.column_names if name != PLACE])
    if len(rows) == 0:
        raise ValueError(f"{where}: {source} has no rows")
    if data.num_items is not None and len(rows) != data.num_items:
        raise ValueError(
            f"{where}: {source} has {len(rows):,} rows where the manifest states {data.num_items:,}: it is another split, version or part, and "
            "its number would not be the benchmark's. Give the right copy with --source, or write a manifest of your own for this one"
        )
    kept = [*manifest.columns.values(), *(name for name in rows.column_names if name == PLACE)]
    rows = rows.select_columns(list(dict.fromkeys(kept)))
    if limit is not None and limit < len(rows):
        rows = rows.select(sorted(random.Random(seed).sample(range(len(rows)), limit)))
    else:
        limit = None
    revision = data.revision or fetched_revision(rows) if folder is None else None
    return OpenedData(rows, source, folder, limit, revision, files=files, where=where)


def fetched_revision(rows: datasets.Dataset) -> str | None:
    """The commit on the Hub that `rows` were fetched from: `datasets` keeps them in a folder of its name. None if there is no such folder."""
    for file in rows.cache_files:
        name = Path(file["filename"]).parent.name
        if re.fullmatch("[0-9a-f]{40}", name):
            return name
    return None


def class_names(classes: Classes, data: OpenedData, label_feature: Any, where: str) -> list[str]:
    """The names of the classes in the order of the labels. ValueError if their number is not the manifest's."""
    if classes.names == "feature":
        if not isinstance(label_feature, datasets.ClassLabel):
            raise ValueError(
                f"{where}: the label column of {data.source} has no class names of its own, but is {label_feature}"
            )
        names = list(label_feature.names)
    elif isinstance(classes.names, list):
        names = classes.names
    elif classes.names.startswith("resource:"):
        names = resource_lines(classes.names.removeprefix("resource:"))
    else:
        names = _source_lines(classes.names.removeprefix("source:"), data, where)
    if classes.pick is not None:
        if max(classes.pick) >= len(names):
            raise ValueError(f"{where}: pick has place {max(classes.pick)}, but there are {len(names)} class names")
        names = [names[place] for place in classes.pick]
    if len(names) != classes.count:
        raise ValueError(f"{where}: {data.source} has {len(names)} classes where the manifest states {classes.count}")
    names = _edited(names, classes.edit, where)
    empty = [place for place, name in enumerate(names) if not name.strip()]
    if empty:
        raise ValueError(f"{where}: class {empty[0]} of {data.source} has an empty name")
    if isinstance(label_feature, datasets.ClassLabel) and len(label_feature.names) != classes.count:
        raise ValueError(
            f"{where}: the labels of {data.source} are of {len(label_feature.names)} classes where the manifest states {classes.count}"
        )
    return names


def _edited(names: list[str], edits: list[list[str]], where: str) -> list[str]:
    deadline = time.monotonic() + _SECONDS_FOR_EDITS
    for pattern, replacement in edits:
        try:
            names = [
                regex.sub(pattern, replacement, name, timeout=max(deadline - time.monotonic(), 0)) for name in names
            ]
        except (regex.error, IndexError) as error:
            raise ValueError(
                f"{where}: edit [{pattern!r:.80}, {replacement!r:.80}] is not a regular expression with its replacement: {error}"
            ) from error
        except TimeoutError as error:
            raise ValueError(
                f"{where}: edit {pattern!r:.80} takes more than {_SECONDS_FOR_EDITS} seconds: write a simpler expression"
            ) from error
    return names


def read_labels(
    column: Iterable[Any], names: list[str], source_names: list[str] | None, row_name: Callable[[int], str]
) -> list[int]:
    """The class of every row as a number. Labels may be numbers or names: one of `names`, or of `source_names`, the same before they were edited for
    prompts. ValueError names the first row whose label is neither.
    """
    place = {name: i for i, name in enumerate(names)} | {name: i for i, name in enumerate(source_names or [])}
    labels = []
    for row, label in enumerate(column):
        number = label
        if isinstance(label, str):  # in a CSV everything is text
            number = place.get(label, int(label) if label.isascii() and label.isdecimal() else -1)
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(names):
            raise ValueError(
                f"{row_name(row)}: the label is {label!r}, which is neither a whole number below {len(names)} nor the name of a class"
            )
        labels.append(number)
    return labels


def read_captions(
    column: Iterable[Any], row_name: Callable[[int], str], separator: str | None = None, most: int | None = None
) -> list[list[str]]:
    """The captions of every row, `most` of each. ValueError names the first row that has none, or one that is empty or no text."""
    captions = []
    for row, value in enumerate(column):
        texts = [value] if isinstance(value, str) else value
        if separator is not None and isinstance(value, str):
            texts = [text for text in value.split(separator) if text.strip()]
        texts = texts[:most] if isinstance(texts, list) else texts
        if not isinstance(texts, list) or not texts:
            raise ValueError(f"{row_name(row)}: there is no caption, but {value!r:.80}")
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"{row_name(row)}: a caption is not text, but {text!r:.80}")
            if not text.strip():
                raise ValueError(f"{row_name(row)}: a caption is empty: leave it out, or the row if it has no other")
        captions.append(texts)
    return captions


def _local(folder: Path | None, source: str, where: str) -> Path:
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(
            f"{where}: {source} has to be fetched and unpacked first; then --source NAME=FOLDER says where it lies"
        )
    return folder


def _table(
    source: str, folder: Path | None, manifest: Manifest, where: str
) -> tuple[datasets.Dataset, NamedFiles | None]:
    """The rows that the manifest chooses, with the columns that it names, and what the rows may name."""
    data = manifest.data
    # A configuration is a name on the Hub; a local copy is what that configuration holds.
    config = data.config if folder is None else None
    texts = tuple(column for key, column in manifest.columns.items() if key.startswith(("caption", "negative")))
    place = PairSource(
        source=source,
        name=config,
        split=data.split,
        revision=data.revision,
        data_files=data.files,
        text_columns=texts or "text",
    )
    try:
        found = find_rows(place, streaming=False, any_split=True)
        columns = list(dict.fromkeys([*manifest.columns.values(), *data.where]))
        there = found.columns(columns)
        for column in columns:
            if column not in there:
                raise missing_column(source, column, there)
        rows = found.by_number(columns)
    except (OSError, ValueError) as error:
        remedy = (
            f"; a local copy is given with --source {manifest.name}=PATH or --data-dir DIR" if folder is None else ""
        )
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(f"{where}: {error}{remedy}") from error
    if BROKEN in rows.column_names:
        broken = next((number for number, reason in enumerate(rows[BROKEN]) if reason is not None), None)
        if broken is not None:
            raise ValueError(f"{where}: {rows[broken][PLACE]} cannot be read: {rows[broken][BROKEN]}")
        rows = rows.remove_columns(BROKEN)
    for column, value in data.where.items():
        rows = rows.select([i for i, found_value in enumerate(rows[column]) if str(found_value) == value])
    if data.first is not None:
        rows = rows.select(range(min(data.first, len(rows))))
    return rows, found.files


def _caption_folder(folder: Path, manifest: Manifest) -> datasets.Dataset:
    """Rows of `image/NAME.jpg` and `caption/NAME.txt`, sorted by name. Urban-1k is laid out like this."""
    where = f"benchmark {manifest.name}"
    found = [_inside(folder, str(path.relative_to(folder)), where) for path in sorted(folder.glob("*/*"))]
    found = [path for path in found if path.is_file() and not path.name.startswith(".")]
    images = {path.stem: path for path in found if path.parent.name == "image" and path.suffix.lower() in IMAGES}
    texts = {path.stem: path for path in found if path.parent.name == "caption" and path.suffix.lower() == ".txt"}
    alone = sorted(set(images) ^ set(texts))
    if alone:
        raise ValueError(
            f"benchmark {manifest.name}: {folder} must hold an image in image/ and a text in caption/ under every name, but "
            f"{alone[0]!r} has only one of them"
        )
    names = list(images)
    return datasets.Dataset.from_dict(
        {
            manifest.columns["image"]: [str(images[name].absolute()) for name in names],
            manifest.columns["captions"]: [_first_line(texts[name]) for name in names],
        }
    )


def _first_line(file: Path) -> str:
    return next((line.strip() for line in read_lines(file) if line.strip()), "")


def _caption_file(folder: Path, manifest: Manifest) -> datasets.Dataset:
    """Rows of a file that names images in `folder`. For retrieval, rows that name the same image become one with all their captions."""
    where, data = f"benchmark {manifest.name}", manifest.data
    file = data.own_captions or _inside(folder, str(data.caption_file), where)
    if not file.is_file():
        raise FileNotFoundError(f"{where}: there is no file {file}")
    if kind_of(file) is None:
        known = ", ".join(ending for endings in KINDS.values() for ending in endings)
        raise ValueError(f"{where}: {file} is of an unknown kind: {known} files are read")
    if data.own_captions is None:
        images = DataFolder(folder, (_inside(folder, data.image_folder, where),))
    else:
        images = DataFolder.beside(folder, file)
    picked: list[dict[str, Any]] = []
    for place, row in _chosen_rows(TableFile(str(file), data.split), data, where):
        values = {key: _pick(row, column, f"{where}: {file}, {place}") for key, column in manifest.columns.items()}
        name = str(values["image"])
        if not picked:
            images = images.settled(name)
        try:
            path = images.find(name)
        except (OSError, ValueError) as error:
            raise type(error)(f"{where}: {file}, {place} names the image {name!r:.200}: {error}") from error
        picked.append({**values, "image": str(path), PLACE: f"{file.name}, {place}"})
    if manifest.kind == "retrieval":
        grouped: dict[str, dict[str, Any]] = {}
        for values in picked:
            some = values["captions"]
            first = grouped.setdefault(values["image"], {**values, "captions": []})
            first["captions"].extend(some if isinstance(some, list) else [some])
        picked = list(grouped.values())
    if not picked:
        raise ValueError(f"{where}: {file} has no rows")
    columns = {column: [values[key] for values in picked] for key, column in manifest.columns.items()}
    return rows_in_memory({**columns, PLACE: [values[PLACE] for values in picked]})


def _chosen_rows(table: TableFile, data: Data, where: str) -> Iterator[Placed]:
    """The rows that the manifest chooses."""
    try:
        rows = (
            (place, row) for place, row in table.rows() if all(str(row.get(k)) == v for k, v in data.where.items())
        )
        yield from islice(rows, data.first)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _pick(row: Row, column: str, where: str) -> Any:
    """What lies at `column` ("a.1.b": key, place, key) in a row. ValueError if there is nothing."""
    value = value_at(row, column)
    if value is None and column not in row:
        raise missing_column(where, column, list(row))
    return value


def _inside(folder: Path, name: str, where: str) -> Path:
    """The path of what a manifest calls `name`. ValueError if it lies outside of the data's folder."""
    try:
        return path_inside(folder, name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _mmvp(folder: Path, where: str) -> datasets.Dataset:
    """Rows of pairs from MMVP-VLM's `Questions.csv`: number, kind and statement of an image in every row, two rows a pair."""
    rows = [list(row.values()) for _, row in TableFile(str(folder / "Questions.csv")).rows()]
    if len(rows) % 2:
        raise ValueError(f"{where}: Questions.csv has {len(rows)} rows, which is not an even number: two are a pair")
    columns: dict[str, list[str]] = {name: [] for name in ("image_1", "image_2", "caption_1", "caption_2", "category")}
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        for place, (number, _, statement) in enumerate((first, second), 1):
            # Both images lie in the folder of the first one's kind.
            columns[f"image_{place}"].append(
                str(_inside(folder, f"MLLM_VLM Images/{first[1]}/{number}.jpg", where).absolute())
            )
            columns[f"caption_{place}"].append(statement)
        columns["category"].append(first[1])
    return datasets.Dataset.from_dict(columns)


def _source_lines(name: str, data: OpenedData, where: str) -> list[str]:
    """Lines of a file that lies beside the data: in its local folder, or in its repository on the Hub."""
    if data.folder is None:
        from huggingface_hub import hf_hub_download

        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"{where}: {name!r} lies outside of the dataset {data.source}")
        path = Path(hf_hub_download(data.source, name, repo_type="dataset", revision=data.revision))
    else:
        path = _inside(data.folder if data.folder.is_dir() else data.folder.parent, name, where)
        if not path.is_file():
            raise FileNotFoundError(f"{where}: there is no {path}, which names the classes")
    return [line.strip() for line in read_lines(path) if line.strip()]
