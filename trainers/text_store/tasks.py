"""Fills a text store task by task. Any number of processes, on machines that share the store's directory, take tasks until none is left.

    tasks/plan.json                 what is divided, and into how many tasks
    tasks/task-7-of-20.json         task 7 is done: what was read and embedded, and its shards
    tasks/task-7-of-20.running      the process that is at work on it, see [`claimed`]
    shard-00007-00000.safetensors   the first shard of task 7

A task is a part of the source, which nobody else reads. Before a text is embedded, and again before it is written, its key is compared with what
all tasks have written by then, so the store holds each text once. Only two tasks that meet the same text at the same time embed it twice.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from modeling_proclip.identity import differences
from trainers.display.progress import Progress
from trainers.storage.files import TEMPORARY_SUFFIX, put_in_place, write_file

from .build import BuildSummary, KeySet, Share, build_store
from .claims import claimed
from .fingerprint import check_fingerprint
from .index import open_index
from .keys import text_keys
from .layout import TASKS, Writer, free_name, open_shard, read_settings, shard_paths, store_lock


_FORMAT = 1
_POLL = 0.5  # seconds between two looks at the tasks of others


@runtime_checkable
class DividedTexts(Protocol):
    """Texts that can be read in parts, such as those of [`divide_texts`]."""

    def __iter__(self) -> Iterator[str]:
        """All texts."""

    def identity(self) -> dict[str, Any]:
        """What tells these texts from others, as JSON."""

    def most_parts(self) -> int | None:
        """How many parts have texts at most; None if there is no bound."""

    def part(self, index: int, count: int) -> Iterable[str]:
        """The texts of part `index` of `count`. All parts, one after the other, are the whole."""


class TextList:
    """The texts of a list, in parts."""

    def __init__(self, texts: Sequence[str]):
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def identity(self) -> dict[str, Any]:
        """Their number and a hash of them."""
        return {"num_texts": len(self._texts), "blake2b": _digest(text_keys(self._texts).tobytes())}

    def most_parts(self) -> int:
        """As many as there are texts."""
        return len(self._texts)

    def part(self, index: int, count: int) -> Sequence[str]:
        """The texts of part `index` of `count`."""
        begin, end = (len(self._texts) * number // count for number in (index, index + 1))
        return self._texts[begin:end]


@dataclass(frozen=True)
class Plan:
    """The tasks of the store at `path`, counted from 1. `digest` tells this plan from an earlier one in the same store."""

    path: Path
    num_tasks: int
    digest: str

    def name(self, task: int) -> str:
        """What a task is called in the names of files."""
        return f"task-{task}-of-{self.num_tasks}"

    def is_done(self, task: int) -> bool:
        """Whether a task is done, and all its shards are there: one that was deleted because it was damaged makes its task undone."""
        try:
            done = json.loads(self._file(task).read_bytes())
            return done["plan"] == self.digest and all((self.path / name).exists() for name in done["shards"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def pending(self, among: Iterable[int] | None = None) -> list[int]:
        """The tasks that are not done: all of them, or only those `among` some."""
        files = {file.name for file in (self.path / TASKS).iterdir()}
        tasks = range(1, self.num_tasks + 1) if among is None else among
        return [task for task in tasks if self._file(task).name not in files or not self.is_done(task)]

    def summary_of(self, task: int) -> BuildSummary:
        """What a task that is done has read and embedded, whoever did it."""
        return BuildSummary(**json.loads(self._file(task).read_bytes())["summary"])

    def summary(self) -> BuildSummary:
        """The sum over all tasks, which are done."""
        return sum(map(self.summary_of, range(1, self.num_tasks + 1)), BuildSummary())

    def set_done(self, task: int, summary: BuildSummary) -> None:
        """Records that a task is done."""
        shards = [file.name for file in self.path.glob(f"{shard_prefix(task)}-*.safetensors")]
        done = {"plan": self.digest, "shards": sorted(shards), "summary": asdict(summary)}
        write_file(self._file(task), json.dumps(done, indent=2).encode())

    def _file(self, task: int) -> Path:
        return self.path / TASKS / f"{self.name(task)}.json"


def shard_prefix(task: int) -> str:
    """How the names of a task's shards begin: each task has names of its own, so nobody writes over the shard of another."""
    return f"shard-{task:05d}"


def open_plan(path: Path, texts: DividedTexts, num_tasks: int, dtype: str, fingerprint: Mapping[str, Any]) -> Plan:
    """The plan of the store at `path`, which is made if there is none, or all tasks of the one that is there are done.

    Raises:
        ValueError: If there is another one that is not done; names what differs.
    """
    wanted = {"format": _FORMAT, "num_tasks": num_tasks, "dtype": dtype, "texts": texts.identity()}
    file = path / TASKS / "plan.json"
    with store_lock(path):
        file.parent.mkdir(exist_ok=True)
        there, shards = read_plan(path), [shard.name for shard in shard_paths(path)]
        if there is not None:
            left = len(there.pending())
            content = json.loads(file.read_bytes())
            encoder, before = content.pop("encoder"), content.pop("shards_before")
            changes = list(differences(content, wanted))
            remedy = (
                f"{left:,} of its {there.num_tasks:,} tasks are left: finish it by the command that began it, or delete {file.parent} to begin "
                "another one, for which nothing is embedded again that the store has"
            )
            if changes and left:
                raise ValueError(f"{file} divides something else into tasks: {'; '.join(changes[:3])}; {remedy}")
            if not changes:
                check_fingerprint(str(file), encoder, fingerprint, remedy)
                if set(before) <= set(shards):
                    return there
                # A task that is done may have left out a text of a shard that was deleted since, because it was damaged.
        content = {**wanted, "encoder": dict(fingerprint), "shards_before": shards}
        written = json.dumps(content, indent=2, ensure_ascii=False).encode()
        write_file(file, written)
        return Plan(path, num_tasks, _digest(written))


def read_plan(path: Path) -> Plan | None:
    """The plan of the store at `path`, None if there is none. ValueError if it cannot be read."""
    file = path / TASKS / "plan.json"
    try:
        content = file.read_bytes()
        plan = json.loads(content)
        if plan["format"] != _FORMAT:
            raise ValueError(f"its format is {plan['format']!r}, and this version reads {_FORMAT}")
        return Plan(path, int(plan["num_tasks"]), _digest(content))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} cannot be read as a plan of tasks: {error!r}. Delete {file.parent}; nothing is embedded again that the store has"
        ) from error


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class StoredKeys:
    """The keys of a store that grows while it is used: those of the shards that are there now by the index, and those that come by `refresh`, at 16
    bytes a text in memory.
    """

    def __init__(self, path: Path, dtype: str):
        self._path, self._dtype = path, dtype
        settings, files = read_settings(path), shard_paths(path)
        self._known, self._new, self._index = {file.name for file in files}, KeySet(), None
        if settings is not None and files:
            self._index = open_index(path, [open_shard(file, settings["dim"], dtype) for file in files])

    def refresh(self) -> None:
        """Reads the keys of the shards that have been written since."""
        for file in shard_paths(self._path):
            if file.name not in self._known:
                settings = read_settings(self._path)
                assert settings is not None  # it is written before the first shard
                keys = np.unique(open_shard(file, settings["dim"], self._dtype).read_keys(), axis=0)
                self._new.add(keys[~self.contains(keys)])
                self._known.add(file.name)

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Which of `keys (n, 2)` were there when it was refreshed last: `(n,)` bool."""
        known = self._new.contains(keys)
        return known if self._index is None else known | (self._index.find(keys)[0] >= 0)


class TaskWriter(Writer):
    """Writes the shards of one task, without the texts that other tasks have written meanwhile: `num_left_out` of them."""

    def __init__(self, plan: Plan, task: int, stored: StoredKeys):
        super().__init__(plan.path, plan.name(task))
        self.num_left_out = 0
        self._prefix, self._stored = shard_prefix(task), stored

    def write_shard(self, embeds: torch.Tensor, keys: np.ndarray) -> None:
        """Writes those of `embeds (n, dim)` with `keys (n, 2)` that are not in the store as the next shard of the task."""
        while len(keys):
            temporary = self.write_temporary(embeds, keys)
            with store_lock(self.path):
                self._stored.refresh()
                missing = ~self._stored.contains(keys)
                if missing.all():
                    put_in_place(temporary, self.path / free_name(self.path, self._prefix))
                    return
            temporary.unlink()
            self.num_left_out += int((~missing).sum())
            embeds, keys = embeds[torch.from_numpy(missing)], keys[missing]


def build_in_tasks(
    path: Path,
    texts: DividedTexts,
    model: torch.nn.Module,
    processor: Any,
    fingerprint: dict[str, Any],
    num_tasks: int,
    *,
    token_budget: int | None,
    shard_size: int,
    dtype: str,
    progress: bool,
) -> BuildSummary:
    """Takes tasks of the store at `path`, one after the other, until all of them are done, by whichever process. What this process did; arguments as of
    [`TextEmbeddingStore.build`].
    """
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
    with store_lock(path):
        Writer(path, f"task-1-of-{num_tasks}").check_division()
    plan = open_plan(path, texts, num_tasks, dtype, fingerprint)
    total, pending, stored = BuildSummary(), plan.pending(), StoredKeys(path, dtype)

    def is_stored(keys: np.ndarray) -> np.ndarray:
        stored.refresh()
        return stored.contains(keys)

    def embed(task: int) -> BuildSummary:
        (path / (plan.name(task) + TEMPORARY_SUFFIX)).unlink(missing_ok=True)  # of a process that was killed
        writer = TaskWriter(plan, task, stored)
        summary = build_store(
            writer,
            texts.part(task - 1, num_tasks),
            model,
            processor,
            fingerprint,
            is_stored,
            0,
            share=Share(),
            token_budget=token_budget,
            shard_size=shard_size,
            dtype=dtype,
            progress=progress,
            title=f"task {task:,} of {num_tasks:,}",
        )
        summary.num_tasks = 1
        summary.num_new -= writer.num_left_out
        summary.num_repeated += writer.num_left_out
        plan.set_done(task, summary)
        return summary

    with Progress("tasks done", num_tasks, "tasks", shown=progress, completed=num_tasks - len(pending)) as bar:
        most = texts.most_parts()
        if most is not None and most < num_tasks:
            bar.write(
                f"the source cannot be cut into more than {most:,} parts: the other {num_tasks - most:,} tasks are empty"
            )

        def still_pending() -> list[int]:
            left = plan.pending(pending)
            bar.advance(num_tasks - len(left) - bar.completed)
            return left

        while pending:
            before = total.num_tasks
            for task in tuple(pending):
                if plan.is_done(task):
                    continue
                with claimed(path, plan.name(task)) as mine:
                    if not mine or plan.is_done(task):
                        continue
                    total += embed(task)
                pending = still_pending()
            pending = still_pending()
            if pending and total.num_tasks == before:
                time.sleep(_POLL)
    return total
