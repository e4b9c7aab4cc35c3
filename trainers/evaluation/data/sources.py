"""Opens the data of a benchmark and checks it against the manifest: a wrong count, column or label is an error, not a number."""

import csv
import dataclasses
import json
import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import regex

from trainers.data.image_folder import ImageFolder
from trainers.storage.paths import path_inside

from .manifest import Classes, Manifest, resource_lines


_SECONDS_FOR_EDITS = 10  # of all class names: an expression from somebody else may backtrack for years

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass
class OpenedData:
    """The rows of one benchmark, checked as far as can be without reading a picture.

    Attributes:
        rows: the dataset; pictures are not decoded.
        source: where the rows were read: the manifest's source, or the local copy that replaced it.
        folder: that local folder, None for the Hub.
        limit: how many of the rows were drawn, None for all.
        revision: of the Hub, as far as it is known.
        num_train: how many of the rows, the first, a linear probe is trained on; the others test it.
    """

    rows: datasets.Dataset
    source: str
    folder: Path | None
    limit: int | None = None
    revision: str | None = None
    num_train: int = 0


def open_data(
    manifest: Manifest, local: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> OpenedData:
    """Opens the rows of `manifest`.

    Args:
        local: a local copy in place of the manifest's source: a file or folder that `datasets` reads, or a folder in the manifest's layout.
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
        rows = _table(source, folder, manifest, where)
        for column, value in data.where.items():
            if column not in rows.column_names:
                raise ValueError(
                    f"{where}: {source} has no column {column!r} to choose rows by; it has {', '.join(rows.column_names)}"
                )
            rows = rows.select([i for i, found in enumerate(rows[column]) if str(found) == value])
        if data.first is not None:
            rows = rows.select(range(min(data.first, len(rows))))
    missing = [column for column in manifest.columns.values() if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"{where}: {source} has no column {missing[0]!r}; the columns are {', '.join(rows.column_names) or 'none'}"
        )
    if len(rows) == 0:
        raise ValueError(f"{where}: {source} has no rows")
    if data.num_items is not None and len(rows) != data.num_items:
        raise ValueError(
            f"{where}: {source} has {len(rows):,} rows where the manifest states {data.num_items:,}: it is another split, version or part, and "
            "its number would not be the benchmark's. Give the right copy with --source, or write a manifest of your own for this one"
        )
    rows = rows.select_columns(list(dict.fromkeys(manifest.columns.values())))
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    if limit is not None and limit < len(rows):
        rows = rows.select(sorted(random.Random(seed).sample(range(len(rows)), limit)))
    else:
        limit = None
    return OpenedData(rows, source, folder, limit, data.revision or fetched_revision(rows) if folder is None else None)


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
                f"{where}: edit [{pattern!r:.80}, {replacement!r:.80}] is no regular expression with its replacement: {error}"
            ) from error
        except TimeoutError as error:
            raise ValueError(
                f"{where}: edit {pattern!r:.80} takes more than {_SECONDS_FOR_EDITS} seconds: write a simpler expression"
            ) from error
    return names


def read_labels(column: Iterable[Any], names: list[str], source_names: list[str] | None, where: str) -> list[int]:
    """The class of every row as a number. Labels may be numbers or names; ValueError names the first row whose label is neither.

    Args:
        names: of the classes.
        source_names: the same as they were before they were edited for prompts, if labels can be names.
    """
    place = {name: i for i, name in enumerate(names)} | {name: i for i, name in enumerate(source_names or [])}
    labels = []
    for row, label in enumerate(column):
        number = place.get(label, -1) if isinstance(label, str) else label
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(names):
            raise ValueError(
                f"{where}, row {row}: the label is {label!r}, which is neither a whole number below {len(names)} nor the name of a class"
            )
        labels.append(number)
    return labels


def read_captions(
    column: Iterable[Any], where: str, separator: str | None = None, most: int | None = None
) -> list[list[str]]:
    """The captions of every row, `most` of each. ValueError names the first row that has none, or one that is empty or no text."""
    captions = []
    for row, value in enumerate(column):
        texts = [value] if isinstance(value, str) else value
        if separator is not None and isinstance(value, str):
            texts = [text for text in value.split(separator) if text.strip()]
        texts = texts[:most] if isinstance(texts, list) else texts
        if not isinstance(texts, list) or not texts:
            raise ValueError(f"{where}, row {row}: there is no caption, but {value!r:.80}")
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"{where}, row {row}: a caption is no text, but {text!r:.80}")
            if not text.strip():
                raise ValueError(
                    f"{where}, row {row}: a caption is empty: leave it out, or the row if it has no other"
                )
        captions.append(texts)
    return captions


def _local(folder: Path | None, source: str, where: str) -> Path:
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(
            f"{where}: {source} has to be fetched and unpacked first; then --source NAME=FOLDER says where it lies"
        )
    return folder


def _table(source: str, folder: Path | None, manifest: Manifest, where: str) -> datasets.Dataset:
    data = manifest.data
    remedy = f"a local copy is given with --source {manifest.name}=PATH or --data-dir DIR"
    # Without a pattern `datasets` takes the kind of most files for that of the data, and one archive beside two texts is a text.
    files = None if data.files is None else {data.split: data.files}
    try:
        if folder is None:
            rows = datasets.load_dataset(
                source, data.config, split=data.split, revision=data.revision, data_files=files
            )
        elif folder.is_file():
            loader = {".jsonl": "json", ".tsv": "csv"}.get(folder.suffix, folder.suffix[1:])
            if loader not in ("csv", "json", "parquet", "arrow"):
                raise ValueError(
                    f"{where}: {folder} is of an unknown kind: .parquet, .arrow, .csv, .tsv, .json and .jsonl are read"
                )
            options = {"sep": "\t"} if folder.suffix == ".tsv" else {}
            rows = datasets.load_dataset(loader, data_files=str(folder), split="train", **options)
        elif (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():  # written by save_to_disk
            rows = datasets.load_from_disk(str(folder))
            if isinstance(rows, datasets.DatasetDict):
                if data.split not in rows:
                    raise ValueError(f"{where}: {folder} has no split {data.split!r}; it has {', '.join(rows)}")
                rows = rows[data.split]
        else:
            # A configuration is a name on the Hub; a local copy is what that configuration holds.
            rows = datasets.load_dataset(str(folder), split=data.split, data_files=files)
    except IndexError as error:  # what load_from_disk makes of a dataset that was saved without rows
        raise ValueError(f"{where}: {source} has no rows") from error
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise OSError(f"{where}: {source} cannot be read ({error}); {remedy}") from error
    except ValueError as error:
        raise (
            error if str(error).startswith("benchmark") else ValueError(f"{where}: {source}: {error}; {remedy}")
        ) from error
    return rows


def _caption_folder(folder: Path, manifest: Manifest) -> datasets.Dataset:
    """Rows of `image/NAME.jpg` and `caption/NAME.txt`, sorted by name. Urban-1k is laid out like this."""
    where = f"benchmark {manifest.name}"
    found = [_inside(folder, str(path.relative_to(folder)), where) for path in sorted(folder.glob("*/*"))]
    found = [path for path in found if path.is_file() and not path.name.startswith(".")]
    pictures = {path.stem: path for path in found if path.parent.name == "image" and path.suffix.lower() in PICTURES}
    texts = {path.stem: path for path in found if path.parent.name == "caption" and path.suffix.lower() == ".txt"}
    alone = sorted(set(pictures) ^ set(texts))
    if alone:
        raise ValueError(
            f"benchmark {manifest.name}: {folder} must hold a picture in image/ and a text in caption/ under every name, but "
            f"{alone[0]!r} has only one of them"
        )
    names = list(pictures)
    return datasets.Dataset.from_dict(
        {
            manifest.columns["image"]: [str(pictures[name].absolute()) for name in names],
            manifest.columns["captions"]: [_first_line(texts[name]) for name in names],
        }
    )


def _first_line(file: Path) -> str:
    return next((line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()), "")


def _caption_file(folder: Path, manifest: Manifest) -> datasets.Dataset:
    """Rows of a file that names pictures in `folder`. For retrieval, rows that name the same picture become one with all their captions."""
    where, data = f"benchmark {manifest.name}", manifest.data
    file = data.own_captions or _inside(folder, str(data.caption_file), where)
    if not file.is_file():
        raise FileNotFoundError(f"{where}: there is no file {file}")
    rows = _file_rows(file, where)
    if data.own_captions is None:
        images = ImageFolder(folder, (_inside(folder, data.image_folder, where),))
    else:
        images = ImageFolder.beside(folder, file)
    numbered = [(i, row) for i, row in enumerate(rows, 1) if all(str(row.get(k)) == v for k, v in data.where.items())]
    picked: list[dict[str, Any]] = []
    for number, row in numbered[: data.first]:
        values = {
            key: _pick(row, column, f"{where}: {file}, row {number}") for key, column in manifest.columns.items()
        }
        name = str(values["image"])
        if not picked:
            images = images.settled(name)
        try:
            path = images.find(name)
        except (OSError, ValueError) as error:
            raise type(error)(f"{where}: {file}, row {number} names the image {name!r:.200}: {error}") from error
        picked.append({**values, "image": str(path)})
    if manifest.kind == "retrieval":
        grouped: dict[str, list[Any]] = {}
        for values in picked:
            some = values["captions"]
            grouped.setdefault(values["image"], []).extend(some if isinstance(some, list) else [some])
        picked = [{"image": path, "captions": some} for path, some in grouped.items()]
    return datasets.Dataset.from_dict(
        {column: [values[key] for values in picked] for key, column in manifest.columns.items()}
    )


def _pick(row: Any, path: str, where: str) -> Any:
    """What lies at `path` ("a.1.b": key, place, key) in a row."""
    value = row
    for step in path.split("."):
        try:
            value = value[int(step)] if isinstance(value, list) else value[step]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            there = ", ".join(map(str, row)) if isinstance(row, dict) else repr(row)
            raise ValueError(f"{where} has no column {path!r}; it has {there}") from error
    return value


def _inside(folder: Path, name: str, where: str) -> Path:
    """The path of what a manifest calls `name`. ValueError if it lies outside of the data's folder."""
    try:
        return path_inside(folder, name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _mmvp(folder: Path, where: str) -> datasets.Dataset:
    """Rows of pairs from MMVP-VLM's `Questions.csv`: number, kind and statement of a picture in every row, two rows a pair."""
    rows = list(csv.reader((folder / "Questions.csv").read_text(encoding="utf-8-sig").splitlines()))[1:]
    if len(rows) % 2:
        raise ValueError(f"{where}: Questions.csv has {len(rows)} rows, which is not an even number: two are a pair")
    columns: dict[str, list[str]] = {name: [] for name in ("image_1", "image_2", "caption_1", "caption_2", "category")}
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        for place, (number, _, statement) in enumerate((first, second), 1):
            # Both pictures lie in the folder of the first one's kind.
            columns[f"image_{place}"].append(
                str(_inside(folder, f"MLLM_VLM Images/{first[1]}/{number}.jpg", where).absolute())
            )
            columns[f"caption_{place}"].append(statement)
        columns["category"].append(first[1])
    return datasets.Dataset.from_dict(columns)


def _file_rows(file: Path, where: str) -> list[dict[str, Any]]:
    try:
        if file.suffix in (".csv", ".tsv"):
            with open(file, encoding="utf-8-sig", newline="") as lines:
                return list(csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ","))
        if file.suffix in (".jsonl", ".jsonlines"):
            with open(file, encoding="utf-8-sig") as lines:
                return [json.loads(line) for line in lines if line.strip()]
        if file.suffix == ".json":
            rows = json.loads(file.read_text(encoding="utf-8-sig"))
            if isinstance(rows, dict):  # number -> row
                rows = list(rows.values())
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError("it holds no objects")
            return rows
        if file.suffix == ".parquet":
            return datasets.Dataset.from_parquet(str(file)).to_list()
    except (ValueError, csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: {file} cannot be read: {error}") from error
    raise ValueError(f"{where}: {file} is of an unknown kind: .csv, .tsv, .json, .jsonl and .parquet files are read")


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
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
