"""What decides the result of a step besides the recipe: the content of data, encoders and the previous step's model, as hashes.

A recipe names files, and files can be replaced under the same name. So every step records the SHA-256 of what it reads, and a resumed step
compares. All bytes are read whenever `proclip train` starts, shared by the processes: less than an epoch of training, which reads the same
files. Repositories on the Hub are identified by their commit instead; a branch keeps the commit that it had at the first run.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub import snapshot_download

from trainers.data.folders import list_files
from trainers.data.pair_source import PairSource
from trainers.data.pair_sources import open_rows
from trainers.data.tables import kind_of
from trainers.display.progress import Progress
from trainers.storage import digests
from trainers.storage.digests import file_digest
from trainers.storage.object_stores import RemoteFile, is_address, list_remote

from .files import RecipeError
from .schema import Recipe


logger = logging.getLogger(__name__)

Json = dict[str, Any]

_MOST_THREADS = 16

# The image files that a source names, by source and hashes of its own files: a table of millions of rows is not read again and again.
_images_of: dict[tuple[str, ...], list[Path]] = {}

# The fields of a recipe that name data, and those that name models.
SOURCES = ("train", "texts", "captions", "plain_texts", "masked_texts", "eval")
MODELS = ("vision", "text", "teacher", "image_processor")


def hash_together(paths: Iterable[Path], processes: PartialState) -> None:
    """Hash the files `paths`, the same on all `processes`, each its share. Afterwards [`file_digest`] knows them all."""
    count = processes.num_processes
    mine = list(dict.fromkeys(paths))[processes.process_index :: count]
    megabytes = [path.stat().st_size / 1e6 for path in mine]
    shown = processes.is_main_process and sum(megabytes) > 100
    progress = Progress("checking data and models", sum(megabytes), "MB", shown=shown)
    threads = ThreadPoolExecutor(min(_MOST_THREADS, max(1, (os.cpu_count() or 1) // count)))
    with progress, threads:
        for size, _ in zip(megabytes, threads.map(file_digest, mine)):
            progress.advance(size)
    for known in gather_object([digests.known]):
        digests.known.update(known)


def is_local(source: PairSource) -> bool:
    """Whether `source` names files of this machine, not a dataset on the Hub or files in an object store."""
    path = Path(source.source)
    if is_address(source.source):
        return False
    return path.is_absolute() or path.exists() or any(character in source.source for character in "*?[")


def data_files(source: PairSource, *, images: bool) -> list[Path]:
    """The local files that decide what is read from `source`: those that it names, and with `images` also the image files that rows name."""
    path, files = Path(source.source), list[Path]()
    if path.is_dir():
        files = [path / name for name in list_files(path)]
    elif is_local(source):
        files = [path] if path.is_file() else [Path(file) for file in sorted(glob(source.source, recursive=True))]
    # A folder holds its images, unless the recipe names another one.
    elsewhere = source.image_folder is not None or (not path.is_dir() and files and kind_of(files[0]))
    if not images or not elsewhere:
        return files
    key = repr(source), *(file_digest(file) for file in files)
    if key not in _images_of:
        _images_of[key] = _named_images(source)
    return [*files, *_images_of[key]]


def _named_images(source: PairSource) -> list[Path]:
    """The image files that the rows of a table name; none if the images are in the table."""
    opened = open_rows(source)
    named: dict[Path, None] = {}
    for row in opened.table.select_columns(opened.image_columns):
        for value in row.values():
            if isinstance(value, str):
                try:
                    file = None if "://" in value else opened.files.find(value)
                except (OSError, ValueError):
                    continue  # a broken row, which is counted when it is read
                if isinstance(file, Path):
                    named.setdefault(file)
            elif value is not None:
                return []
    return list(named)


def describe_data(source: PairSource, *, images: bool) -> Json:
    """The content of `source`: number, bytes and joint hash of its files and commit, or just the commit of a dataset on the Hub. Files in an object store
    are told apart by the versions that the store gives them, and not read.
    """
    digest, num_bytes = hashlib.sha256(), 0
    files, remote = data_files(source, images=images), list[RemoteFile]()
    if is_address(source.source):
        remote = list_remote(source.source)
    elif not is_local(source):
        digest.update(f"{source.revision}\n".encode())
        if not files:
            return {"commit": source.revision}
    for found in remote:
        digest.update(f"{found.url}\0{found.version}\n".encode())
        num_bytes += found.size
    for file in files:
        digest.update(
            f"{os.path.relpath(file, source.source)}\0{file_digest(file)}\n".encode("utf-8", "surrogateescape")
        )
        num_bytes += file.stat().st_size
    return {"files": len(remote) + len(files), "bytes": num_bytes, "sha256": digest.hexdigest()}


def model_files(folder: Path) -> list[Path]:
    """The files of a model's folder from which it, its tokenizer and its processor are loaded."""
    return sorted(
        file for file in folder.iterdir() if file.is_file() and file.suffix != ".md" and not file.name.startswith(".")
    )


def describe_model(name_or_path: str | Path, revision: str | None) -> Json:
    """The hashes of a model's files by name, or the commit of a model on the Hub."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        return {"commit": revision}
    return {file.name: file_digest(file) for file in model_files(folder)}


# Names on the Hub


def find_commits(recipe: Recipe, known: Json) -> Json:
    """The commits of the Hub repositories that the recipe names: those in `known`, and the current ones of other repositories.

    Returns:
        Key of the recipe -> `{"name", "revision", "commit"}`; the commit is None of a dataset for which it cannot be found out: `datasets` may
        have a copy of it all the same. RecipeError if there is no such model.
    """
    found = {}
    for key, name, revision, kind in _hub_names(recipe):
        asked = {"name": name, "revision": revision}
        before = known.get(key, {})
        same = asked.items() <= before.items()
        found[key] = {**asked, "commit": before["commit"] if same else _commit(key, name, revision, kind)}
    return found


def with_commits(recipe: Recipe, commits: Json) -> Recipe:
    """`recipe` with `commits`, see [`find_commits`], in place of branches and tags."""
    models: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for key, name, revision, kind in _hub_names(recipe):
        known = commits.get(key, {})
        if {"name": name, "revision": revision}.items() <= known.items() and known["commit"] is not None:
            field = key.partition(".")[2]
            if kind == "model":
                models[f"{field}_revision"] = known["commit"]
            else:
                data[field] = replace(getattr(recipe.data, field), revision=known["commit"])
    return replace(recipe, model=replace(recipe.model, **models), data=replace(recipe.data, **data))


def _hub_names(recipe: Recipe) -> list[tuple[str, str, str, str]]:
    """The Hub repositories that a recipe names: key of the recipe, name, revision, and kind of repository."""
    names = []
    for field in MODELS:
        name, revision = recipe.model.place_of(field)
        if not Path(name).is_absolute() and not Path(name).exists():
            names.append((f"model.{field}", name, revision, "model"))
    for field in SOURCES:
        source = getattr(recipe.data, field)
        if source is not None and not is_local(source) and not is_address(source.source):
            names.append((f"data.{field}", source.source, source.revision or "main", "dataset"))
    return names


def _commit(key: str, name: str, revision: str, kind: str) -> str | None:
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    try:  # fetches no file; without a network, the commit that was fetched last
        return Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=[])).name
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        if kind == "model":
            raise RecipeError(
                f"{key}: there is no folder {name}, and on the Hub it cannot be found: {reason}"
            ) from error
        logger.warning(
            "%s: the commit of %s cannot be found out, so changes of it will not be noticed: %s", key, name, reason
        )
        return None


def changes_of(before: Json, now: Json) -> list[str]:
    """The differences between two records of inputs, as phrases."""
    changes = []
    for key in dict.fromkeys([*before, *now]):
        was, found = before.get(key), now.get(key)
        if was == found:
            continue
        if not was or not found:
            changes.append(f"{key} was {_shown(was)} and is {_shown(found)}")
        elif "sha256" in was and "sha256" in found:
            changes.append(f"{key} has changed: it was {_shown(was)} and is {_shown(found)}")
        else:
            names = [name for name in dict.fromkeys([*was, *found]) if was.get(name) != found.get(name)]
            changes.append(f"{key} has changed: {_named(names)}")
    return changes


def _shown(record: Json | None) -> str:
    if not record:
        return "missing"
    if "sha256" not in record:
        return _named(list(record))
    return f"{record['files']:,} files of {record['bytes']:,} bytes, SHA-256 {record['sha256'][:12]}"


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
