"""Fills a text store with the workers of a Ray cluster, which take the same tasks as processes that are started by hand.

Ray places the workers and restarts those that die. The texts do not pass through it: each worker reads its own tasks, as far ahead as its model
needs, and writes shards. So the cluster's object store stays empty, what a row or a broken row is does not depend on the engine, and a run that was
stopped is resumed from the store's directory, which Ray itself would not do.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from trainers.display.progress import Progress

from .build import BuildSummary
from .layout import make_directory
from .remote import check_directory
from .store import TextEmbeddingStore
from .tasks import DividedTexts, Plan, read_plan


logger = logging.getLogger(__name__)

_RESTARTS = 5  # of a worker that dies: more say that its tasks kill it
_OBJECT_STORE = 80 << 20  # bytes, close to the least that Ray takes: no texts and no embeddings go there
_POLL = 1.0  # seconds


class EmbeddingWorker:
    """A process on one device, which Ray starts."""

    def build(
        self, texts: DividedTexts, load: Callable[[], tuple[torch.nn.Module, Any]], path: Path, options: dict[str, Any]
    ) -> BuildSummary:
        """Takes tasks until all are done."""
        store = TextEmbeddingStore.build(texts, *load(), path, progress=False, **options)
        assert store.build_summary is not None
        return store.build_summary


def build_with_ray(
    texts: DividedTexts,
    load: Callable[[], tuple[torch.nn.Module, Any]],
    path: str | Path,
    *,
    num_tasks: int = 100,
    num_workers: int | None = None,
    progress: bool = True,
    **options: Any,
) -> TextEmbeddingStore:
    """Fills a text store as [`TextEmbeddingStore.build`] does with `num_tasks`, by workers of a Ray cluster: of the one that `ray.init` has connected to,
    or that RAY_ADDRESS names, or else of a new one on this machine, which ends with this call. All machines need this package, and see `texts`
    and `path` under the same names.

    If the driver ends, so do the workers; the same call continues. Ray's usage statistics and dashboard are off in a cluster that is started here.

    Args:
        texts: texts in parts, see [`divide_texts`]. They are pickled.
        load: gives the model and the processor, in each worker; a worker sees one GPU, if there are any. It is pickled.
        path: directory of the store.
        num_tasks: tasks, some tens for each worker.
        num_workers: by default one for each GPU of the cluster, or one for each machine if there is none.
        progress: whether to show tasks, texts and texts a second.
        options: `token_budget`, `shard_size` and `dtype` of [`TextEmbeddingStore.build`].

    Returns:
        The opened store; its `build_summary` tells what the tasks of all runs did.

    Raises:
        ConnectionError: If no cluster answers at RAY_ADDRESS, after 40 seconds.
        ChildProcessError: If all workers have died more often than Ray starts one anew; what was embedded stays.
        ValueError: If `num_workers` is less than 1. Otherwise as [`TextEmbeddingStore.build`].
    """
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}")
    check_directory(path)
    path = Path(path).absolute()
    make_directory(path)
    with _cluster():
        workers = _start_workers(num_workers)
        texts_once = ray.put(texts)
        runs = [one.build.remote(texts_once, load, path, {"num_tasks": num_tasks, **options}) for one in workers]
        with Progress("embedding texts", num_tasks, "tasks", shown=progress) as bar:
            _wait(runs, path, bar)
    store, plan = TextEmbeddingStore(path), read_plan(path)
    assert plan is not None
    store.build_summary = plan.summary()
    return store


@contextmanager
def _cluster() -> Iterator[None]:
    """A connection to a cluster; one that is made here ends with the block, and so do the workers."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        # Read by the processes that Ray starts; there is no argument for it.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", include_dashboard=False, object_store_memory=_OBJECT_STORE, logging_level=logging.ERROR)
    else:
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")  # attempts of 40 s each; otherwise 20 of them
        try:
            ray.init(address, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ConnectionError(
                f"no Ray cluster answers at {address}, which RAY_ADDRESS names ({' '.join(str(error).split())}): start it, or unset RAY_ADDRESS to "
                "use this machine"
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _start_workers(number: int | None) -> list[Any]:
    """Workers with equal parts of the cluster: `number` of them, or else one for each GPU, or one for each machine if there is none."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    gpus = sum(resources.get("GPU", 0) for resources in machines)
    number = number or int(gpus) or len(machines)
    cpus = min(resources["CPU"] for resources in machines) * len(machines)
    needs = {"num_cpus": max(cpus // number, 1), "num_gpus": min(gpus / number, 1)}
    worker = ray.remote(max_restarts=_RESTARTS, max_task_retries=_RESTARTS, **needs)(EmbeddingWorker)
    return [worker.remote() for _ in range(number)]


def _wait(runs: list[Any], path: Path, bar: Progress) -> None:
    """Returns when the first of `runs` does, which is when all tasks are done. A worker that is lost leaves its tasks to the others."""
    show = _watched(path, bar)
    while True:
        ended, runs = ray.wait(runs, timeout=_POLL)
        show()
        if not ended:
            continue
        try:
            ray.get(ended[0])
            return
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            if not runs:
                raise ChildProcessError(
                    f"every worker has died {_RESTARTS + 1} times: {' '.join(str(error).split())}. What was embedded is in {path}, and the same "
                    "command continues"
                ) from error
            logger.warning("a worker has died %d times and is not started again: %s", _RESTARTS + 1, error)


def _watched(path: Path, bar: Progress) -> Callable[[], None]:
    """Shows what has been done whenever it is called: tasks, and the texts that were embedded since the first call."""
    plan: Plan | None = None
    pending: list[int] = []
    num_texts, started = 0, time.monotonic()

    def show() -> None:
        nonlocal plan, pending, num_texts
        now = read_plan(path)
        if now is None:
            return
        left = now.pending(pending if now == plan else None)
        if now == plan:
            num_texts += sum(plan.summary_of(task).num_new for task in set(pending).difference(left))
            speed = num_texts / (time.monotonic() - started)
            bar.note = f"{num_texts:,} texts, {speed:,.1f} texts/s"
        plan, pending = now, left
        bar.advance(plan.num_tasks - len(pending) - bar.completed)

    return show
