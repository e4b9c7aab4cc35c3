"""Copies of rows in Arrow, which are mapped and read by number. A copy belongs to what its files hold, not to their names or times."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from filelock import FileLock

from trainers.display.progress import track
from trainers.storage.digests import file_digest
from trainers.storage.files import replacing, write_file

from .archives import BROKEN
from .shards import Shard


logger = logging.getLogger(__name__)

# The column that says where a row is, for messages.
PLACE = "__place__"

_VERSION = 1  # of how rows are copied: another one makes other copies
_MOST_FILES = 64  # copies that a source is divided into
_ROWS = 1000  # of a batch
_BYTES = 32 << 20  # of a batch


def read_rows(shards: Sequence[Shard], columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of `shards` as they come: `columns` (None where a row lacks one), their place, and why a row is broken."""
    for shard in shards:
        for place, row in shard.rows(columns):
            values = {column: row.get(column) for column in columns}
            yield {**values, PLACE: f"{shard.name}, {place}", BROKEN: row.get(BROKEN)}


def copied_rows(shards: Sequence[Shard], columns: list[str]) -> datasets.Dataset:
    """The same rows by number, copied once into the cache of `datasets` (`HF_DATASETS_CACHE`).

    Files and copy are hashed at every opening: what the files hold decides which copy is theirs, and a copy that was interrupted or has changed
    since it was written is made again. Of several processes one makes it and the others wait. ValueError names a file that is damaged, or lacks
    a column.
    """
    size = -(-len(shards) // _MOST_FILES)
    parts = [shards[start : start + size] for start in range(0, len(shards), size)]
    features = shards[0].features(columns)
    features = datasets.Features({**features, PLACE: datasets.Value("string"), BROKEN: datasets.Value("string")})
    return datasets.concatenate_datasets(
        [datasets.Dataset.from_file(str(_copy(part, columns, features))) for part in parts]
    )


def rows_in_memory(columns: Mapping[str, list[Any]]) -> datasets.Dataset:
    """Rows of values of any type that JSON has, also of several in one column, held in memory."""
    features = datasets.Features({name: datasets.Json() for name in columns})
    schema = features.arrow_schema
    arrays = [_array(values, schema.field(name), features[name], []) for name, values in columns.items()]
    return datasets.Dataset(pyarrow.Table.from_arrays(arrays, schema=schema))


def _copy(shards: Sequence[Shard], columns: list[str], features: datasets.Features) -> Path:
    """The copy of some shards, made if it is not there or is no longer what was written."""
    identity = [_VERSION, columns, features.to_dict(), [[repr(shard), shard.digest()] for shard in shards]]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    path = Path(datasets.config.HF_DATASETS_CACHE) / "proclip" / f"{name}.arrow"
    if not _is_sound(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not _is_sound(path):
                if _digest_file(path).exists():
                    logger.warning(
                        "%s, a copy of %s, is missing or has changed: making it again", path, shards[0].name
                    )
                _write(path, shards, columns, features)
                write_file(_digest_file(path), file_digest(path).encode())
    return path


def _is_sound(path: Path) -> bool:
    """Whether a copy is there and is what was written. One of an earlier release, without a digest, is not."""
    try:
        return file_digest(path) == _digest_file(path).read_text()
    except FileNotFoundError:
        return False


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _write(path: Path, shards: Sequence[Shard], columns: list[str], features: datasets.Features) -> None:
    schema = features.arrow_schema
    rows = track(read_rows(shards, columns), f"copying {shards[0].name}", "rows")
    with replacing(path) as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for batch in _batches(iter(rows)):
            arrays = [
                _array([row[name] for row in batch], schema.field(name), features[name], batch)
                for name in schema.names
            ]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch, size = list[dict[str, Any]](), 0
    for row in rows:
        batch.append(row)
        size += sum(
            len(value["bytes"] or b"") for value in row.values() if isinstance(value, dict) and "bytes" in value
        )
        if len(batch) == _ROWS or size > _BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _array(values: list[Any], field: pyarrow.Field, feature: Any, rows: list[dict[str, Any]]) -> pyarrow.Array:
    """`values` in Arrow. ValueError that names the row if one is of another type than those of the first file."""
    try:
        if isinstance(feature, datasets.Json):
            texts = [None if value is None else json.dumps(value) for value in values]
            return pyarrow.ExtensionArray.from_storage(field.type, pyarrow.array(texts, field.type.storage_type))
        return pyarrow.array(values, field.type)
    except (pyarrow.ArrowException, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{rows[0][PLACE]} and the next {len(rows)} rows: column {field.name!r} is not of the type {field.type}: {error}"
        ) from error
