"""A corpus that two workers of a Ray cluster embed while one of them, and then the driver, is killed, against the store of one process.

    pip install "proclip-transformers[ray]"
    python benchmarks/corpora.py --json results.json

The encoder is a stand-in: a text's embedding is a piece of a fixed random vector, which tells of every row whether it is the right one, and each text
takes 50 microseconds (or `--seconds-per-text`) of waiting, as for a device.

1. The corpus is written: JSON lines in 8 files. A tenth of the rows repeats a text of another file.
2. One process embeds it.
3. A cluster is started on this machine. A driver (`build_with_ray`) gives the tasks to two workers. One of these is killed (SIGKILL) while it is at
   work, when a quarter of the tasks is done, and the driver when half of them are. This process then does what the driver did, and finishes.
4. The two stores are compared, row for row by key, and the second is verified.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


DIM = 32
NUM_FILES, NUM_TASKS, NUM_WORKERS = 8, 40, 2
SHARD_SIZE = 2048
TIME_LIMIT = 600  # seconds that a step may take


def text_of(number: int) -> str:
    """A caption-like text of about 60 bytes."""
    return f"image {number}: a red fox beside a boat, seen from the river"


def write_corpus(folder: Path, num_texts: int) -> int:
    """Writes `num_texts` different texts, and a tenth of them again in the file behind. Returns the number of rows."""
    folder.mkdir()
    num_rows = 0
    for file in range(NUM_FILES):
        numbers = list(range(file, num_texts, NUM_FILES))
        numbers += [number - 1 for number in numbers[::10] if number]
        rows = "".join(json.dumps({"text": text_of(number)}) + "\n" for number in numbers)
        (folder / f"part-{file}.jsonl").write_text(rows)
        num_rows += len(numbers)
    return num_rows


def load_stand_in(num_texts: int, seconds_per_text: float) -> tuple[None, None]:
    """Puts the stand-in in the place of model and processor, in this process."""
    from trainers.text_store import build as store_build
    from trainers.text_store import encoding as text_encoding

    pool = torch.randn(num_texts + DIM, generator=torch.Generator().manual_seed(0)).unfold(0, DIM, 1)

    def encode(texts: Sequence[str], *args: Any, **kwargs: Any) -> Iterator[Any]:
        numbers = [int(text[6 : text.index(":")]) for text in texts]
        for begin in range(0, len(texts), 64):
            indices = list(range(begin, min(begin + 64, len(texts))))
            time.sleep(seconds_per_text * len(indices))
            yield text_encoding.EncodedBatch(indices, pool[[numbers[i] for i in indices]], 0)

    store_build.encode_texts = encode
    text_encoding.encoder_fingerprint = lambda model, processor: {"model": "stand-in", "max_length": 64}
    return None, None


def build_alone(folder: Path, num_texts: int, seconds_per_text: float) -> float:
    """Embeds the corpus in this process. The seconds that it took."""
    from trainers.data import TextEmbeddingStore
    from trainers.data.text_files import read_texts

    started = time.perf_counter()
    source = read_texts(folder / "corpus")
    model, processor = load_stand_in(num_texts, seconds_per_text)
    TextEmbeddingStore.build(source, model, processor, folder / "alone", shard_size=SHARD_SIZE, progress=False)
    return time.perf_counter() - started


def drive(folder: Path, num_texts: int, seconds_per_text: float) -> None:
    """The driver: embeds the corpus by the workers of the cluster that is connected, or that RAY_ADDRESS names."""
    from functools import partial

    from trainers.data.text_files import divide_texts
    from trainers.text_store.ray_workers import build_with_ray

    build_with_ray(
        divide_texts(folder / "corpus"), partial(load_stand_in, num_texts, seconds_per_text), folder / "ray",
        num_tasks=NUM_TASKS, num_workers=NUM_WORKERS, shard_size=SHARD_SIZE, progress=False,
    )  # fmt: skip


def num_done(path: Path) -> int:
    """How many tasks of a store are done."""
    return len(list(path.glob("tasks/task-*.json")))


def wait_until(condition: Callable[[], Any], driver: subprocess.Popen) -> Any:
    """What `condition` gives as soon as it gives something."""
    deadline = time.monotonic() + TIME_LIMIT
    while not (found := condition()):
        if driver.poll() is not None or time.monotonic() > deadline:
            driver.kill()
            raise RuntimeError("the driver ended before it was killed: take more texts")
        time.sleep(0.005)
    return found


def build_with_deaths(folder: Path, num_texts: int, seconds_per_text: float) -> dict[str, Any]:
    """Embeds the corpus on a cluster of this machine, with deaths. Who was killed when, and the seconds that it took."""
    import ray

    from trainers.text_store.claims import running_process

    store = folder / "ray"

    def worker_at_work() -> int | None:
        owners = (running_process(store, f"task-{task}-of-{NUM_TASKS}") for task in range(1, NUM_TASKS + 1))
        return next((int(owner["pid"]) for owner in owners if owner is not None), None)

    started = time.perf_counter()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        "local", num_cpus=NUM_WORKERS, include_dashboard=False, object_store_memory=80 << 20, logging_level="ERROR"
    )
    try:
        cluster_seconds, started = time.perf_counter() - started, time.perf_counter()
        environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        command = [sys.executable, __file__, "--drive", str(folder), "--num-texts", str(num_texts)]
        command += ["--seconds-per-text", str(seconds_per_text)]
        driver = subprocess.Popen(command, env=environment)
        wait_until(lambda: num_done(store) >= NUM_TASKS // 4, driver)
        worker = wait_until(worker_at_work, driver)
        os.kill(worker, signal.SIGKILL)
        at_death_of_worker = num_done(store)
        wait_until(lambda: num_done(store) >= NUM_TASKS // 2, driver)
        driver.kill()
        driver.wait()
        at_death_of_driver = num_done(store)
        drive(folder, num_texts, seconds_per_text)
        seconds = time.perf_counter() - started
    finally:
        ray.shutdown()
    return {
        "tasks": NUM_TASKS,
        "done_when_a_worker_was_killed": at_death_of_worker,
        "done_when_the_driver_was_killed": at_death_of_driver,
        "cluster_seconds": cluster_seconds,
        "seconds": seconds,
    }


def compare(folder: Path) -> dict[str, Any]:
    """Whether the stores hold the same keys, each once, with the same embeddings."""
    from trainers.data import TextEmbeddingStore
    from trainers.text_store.verify import verify_store

    rows = []
    for name in ("alone", "ray"):
        store = TextEmbeddingStore(folder / name)
        keys = np.concatenate([shard.read_keys() for shard in store.shards])
        embeds = torch.cat(list(store.blocks()))
        order = np.lexsort(keys.T)
        rows.append((keys[order], embeds[torch.from_numpy(order)]))
    (keys, embeds), (other_keys, other_embeds) = rows
    return {
        "rows": len(other_keys),
        "same_keys": np.array_equal(keys, other_keys),
        "same_embeddings": torch.equal(embeds, other_embeds),
        "problems": verify_store(folder / "ray", progress=False).problems,
    }


def main() -> None:
    """Runs all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-texts", type=int, default=200_000, help="different texts")
    parser.add_argument("--seconds-per-text", type=float, default=50e-6, help="of waiting")
    parser.add_argument("--json", type=Path, help="file that the table is written to")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive is not None:
        return drive(args.drive, args.num_texts, args.seconds_per_text)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_rows = write_corpus(folder / "corpus", args.num_texts)
        seconds = build_alone(folder, args.num_texts, args.seconds_per_text)
        deaths = build_with_deaths(folder, args.num_texts, args.seconds_per_text)
        found = compare(folder)
    assert found == {"rows": args.num_texts, "same_keys": True, "same_embeddings": True, "problems": []}, found
    rows = [
        {"name": "one process", "rows_read": num_rows, "rows_stored": args.num_texts, "seconds": seconds},
        {"name": f"Ray, {NUM_WORKERS} workers", "rows_read": num_rows, "rows_stored": found["rows"], **deaths},
    ]
    for row in rows:
        print(json.dumps(row))
    if args.json is not None:
        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
