"""The checkpoints of a training: complete or not, unchanged or not, and which of them are kept.

A checkpoint is the folder `checkpoint-<step>`; whatever else lies beside it is none. Its `manifest.json` has size and SHA-256 of every
other file in it. It is written twice: first without files, which marks a checkpoint that is being written, and last, when all files are on
the disk. Checkpoints of releases without manifests count as complete when `trainer_state.json`, which was their last file, can be read.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import TrainerState

from trainers.storage.files import sync_folder, write_file


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE_FILE = "trainer_state.json"
_FILES_OF_ENGINES = {"FSDP": "pytorch_model_fsdp*", "DeepSpeed": "global_step*"}
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)", re.ASCII)
_CHUNK = 2**20  # bytes


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from; names the file and what is wrong with it."""


class UnfinishedError(CheckpointError):
    """A checkpoint that was not written to its end, as by a killed process."""


class MissingFileError(FileNotFoundError, CheckpointError):
    """A checkpoint that lacks a file; names it."""


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in `output_dir`, complete or not, by their steps."""
    folders = {
        int(match.group(1)): folder
        for folder in Path(output_dir).glob("checkpoint-*")
        if (match := _NAME.fullmatch(folder.name)) and folder.is_dir()
    }
    return [folders[step] for step in sorted(folders)]


def last_written_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint of the most steps in `output_dir` that was written to its end, changed since or not; None if there is none. Reads no weights."""
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            if _read_manifest(folder) is None:
                _check_without_manifest(folder)
        except UnfinishedError:
            continue
        except CheckpointError:
            pass  # resuming names what is wrong
        return folder
    return None


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """The checkpoint of the most steps in `output_dir` that is complete and unchanged. Reads all of its files. One that is not is passed over, with a
    warning that names the file. CheckpointError if there is none.
    """
    reasons: list[CheckpointError] = []
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            verify(folder)
        except CheckpointError as error:
            logger.warning(f"{error}; looking for the checkpoint before it.")
            reasons.append(error)
        else:
            return str(folder)
    message = f"{output_dir} holds no complete checkpoint to resume from: to start anew, delete it, or leave resume_from_checkpoint out"
    raise type(reasons[0])(f"{reasons[0]}, and {message}") if reasons else CheckpointError(message)


def begin(folder: Path) -> None:
    """Make an empty `folder` for a checkpoint that is not complete; one of an earlier run goes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_manifest(folder, None)
    sync_folder(folder.parent)


def complete(folder: Path) -> None:
    """Declare the checkpoint in `folder` complete: all processes have written their files. Puts them on the disk, then the manifest."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)
    # Hashing releases the interpreter's lock, and the system writes in the meantime.
    with ThreadPoolExecutor() as pool:
        facts = list(pool.map(_put_on_disk, files))
    for inner in {file.parent for file in files}:
        sync_folder(inner)
    _write_manifest(
        folder, {file.relative_to(folder).as_posix(): fact for file, fact in zip(files, facts, strict=True)}
    )


def verify(folder: str | Path) -> None:
    """Check that the checkpoint in `folder` is complete and that its files are those that were written. Reads them all. CheckpointError names the file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFileError(f"there is no checkpoint {folder}")
    manifest = _read_manifest(folder)
    if manifest is None:
        _check_without_manifest(folder)
        logger.warning(f"{folder} was written without a manifest, so its files cannot be verified.")
        return
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda name: _facts(folder / name), manifest))
    for (name, expected), actual in zip(manifest.items(), found, strict=True):
        if actual is None:
            raise MissingFileError(f"{folder / name} is missing")
        if actual != expected:
            what = f"{expected['size']:,} bytes were written and {actual['size']:,} are there"
            if actual["size"] == expected["size"]:
                what = "its SHA-256 is another one"
            raise CheckpointError(f"{folder / name} was damaged after it was written: {what}")


def check_resumable(folder: str | Path, *, num_processes: int, batch_size: int, engine: str | None) -> None:
    """Check that a run on `num_processes`, of batches of `batch_size` rows on each, goes on from a checkpoint where it was: Transformers starts anew, without a
    word, what is missing, and counts the rows that were read in batches of the present size. `engine` is "FSDP", "DeepSpeed" or None.
    """
    folder = Path(folder)
    written_by = next((name for name, files in _FILES_OF_ENGINES.items() if any(folder.glob(files))), None)
    optimizer = "global_step*" if written_by == "DeepSpeed" else "optimizer*"
    for pattern in (STATE_FILE, "scheduler.pt", optimizer, "rng_state*.pth"):
        if not any(folder.glob(pattern)):
            raise MissingFileError(
                f"{folder / pattern} is missing, so the run cannot go on where it was (save_only_model=True leaves it out): resume from another "
                "checkpoint, or start a new run from these weights"
            )
    if written_by != engine:
        before, now = (
            "without FSDP or DeepSpeed" if name is None else f"under {name}" for name in (written_by, engine)
        )
        raise CheckpointError(
            f"{folder} was written {before}, and this run is {now}: resume it as it was begun, or start a new run from its weights, which are whole "
            "(from_pretrained)"
        )
    parts = len(list(folder.glob("global_step*/*_optim_states.pt")))
    if written_by == "DeepSpeed" and parts != num_processes:
        raise CheckpointError(
            f"{folder} was written on {parts} processes, and DeepSpeed resumes on as many, not on {num_processes}: start as many, or start a new run "
            "from its weights, which are whole (from_pretrained)"
        )
    _check_same_rows(folder, num_processes, batch_size)


def _check_same_rows(folder: Path, num_processes: int, batch_size: int) -> None:
    """Raises CheckpointError if a step of the run that wrote `folder` had more or fewer rows. The same rows shared by another number of processes are read in
    the same order.
    """
    state = _read_state(folder)
    written = len(list(folder.glob("rng_state*.pth")))
    if state is None or not state.train_batch_size or not written:
        return  # named as missing, or of a release that did not record it
    if any(folder.glob("stream_*.json")):
        return  # which say how far each process has read, and are compared with the stream's readers when it is opened
    if written * state.train_batch_size != num_processes * batch_size:
        raise CheckpointError(
            f"{folder} was written on {written} x {state.train_batch_size} rows a step (processes x per_device_train_batch_size), and this run has "
            f"{num_processes} x {batch_size}: it would go on with other rows. Change per_device_train_batch_size so that the product is the same"
        )
    if written != num_processes:
        logger.warning(
            f"{folder} was written on {written} processes and is resumed on {num_processes}: the rows are the same, but what is random in the "
            "model, such as dropout, is drawn anew."
        )


def steps_of(folder: str | Path) -> int:
    """The optimizer steps after which the checkpoint in `folder` was written."""
    return TrainerState.load_from_json(str(Path(folder, STATE_FILE))).global_step


def rotate(output_dir: str | Path, keep: int | None, protected: Iterable[str | Path | None] = ()) -> None:
    """Delete the checkpoints that were written longest ago until `keep` are left (`None`: all), never a `protected` one. Only `checkpoint-<number>` is
    counted and deleted; Transformers' own rotation would take `checkpoint-2.bak` too.
    """
    if not keep or keep < 1:
        return
    kept = {Path(folder).absolute() for folder in protected if folder is not None}
    folders = list_checkpoints(output_dir)
    # By time, as an earlier run may have left checkpoints of later steps here.
    by_age = sorted(folders, key=lambda folder: folder.stat().st_mtime_ns)
    for folder in [folder for folder in by_age if folder.absolute() not in kept][: max(len(folders) - keep, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def _write_manifest(folder: Path, files: dict[str, Any] | None) -> None:
    content = {"format": 1, "files": files, "files_sha256": _sha256_of(files)}
    write_file(folder / MANIFEST, json.dumps(content, indent=1).encode() + b"\n")


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Path in the checkpoint -> its size and SHA-256; None if there is no manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, intact = manifest["files"], manifest["files_sha256"] == _sha256_of(manifest["files"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        intact = False
    if not intact:
        raise CheckpointError(f"{folder / MANIFEST} was damaged after it was written")
    if files is None:
        raise UnfinishedError(f"{folder} was not written to its end")
    return files


def _sha256_of(files: Any) -> str:
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _check_without_manifest(folder: Path) -> None:
    if _read_state(folder) is None:
        raise UnfinishedError(f"{folder} was not written to its end ({STATE_FILE} is missing or cut)")


def _read_state(folder: Path) -> TrainerState | None:
    """The state of the Trainer in a checkpoint, or None if it is missing or cut."""
    try:
        return TrainerState.load_from_json(str(folder / STATE_FILE))
    except (OSError, ValueError, TypeError):
        return None


def _put_on_disk(file: Path) -> dict[str, Any]:
    facts = _facts(file)
    assert facts is not None
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
    return facts


def _facts(file: Path) -> dict[str, Any] | None:
    """Size and SHA-256 of a file, or None if it is not there."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(file, "rb") as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except (FileNotFoundError, IsADirectoryError):
        return None
    return {"size": size, "sha256": digest.hexdigest()}
