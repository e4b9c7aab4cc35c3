"""A text store of a million rows: built, killed, resumed, verified, and looked up in at random, against LMDB.

    pip install lmdb
    python benchmarks/text_store.py --json results.json

The encoder is a stand-in that costs next to nothing, so what is measured is the store: a text's embedding is a piece of a fixed random vector,
which tells at every look-up whether it is the right one. LMDB 3 (a memory-mapped B+ tree, what data sets for training are often kept in) gets
the same keys (BLAKE2b of the text) and the same bytes, written in transactions of as many rows as our shards have.

1. `proclip`'s builder writes the store in a process that is killed (SIGKILL) when 40 % of the shards are there; started again, it embeds
   the rest. Then the store is verified.
2. Random texts are looked up in turns of 100,000 rows by a process for each side, on one thread each, in batches of 2,048 as a data worker
   asks for them, with the files in the page cache; the medians are compared. The rate is by processor time, which other work on the
   machine disturbs little, and by the clock. Making the texts is not counted; hashing them is.
3. The resident memory (VmRSS of /proc/self/status) of each of these processes, at the end; it counts Python, NumPy and torch, and pages of
   mapped files. RssAnon is the part of it that is the process's own.
4. With `--index-texts N`: a store of N random keys and embeddings of one number, to see how the index scales: making it, the most memory
   that this took (VmHWM), opening it, and looking up.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


SHARD_SIZE = 8192
BATCH_SIZE = 2048  # texts of a look-up
ROWS_A_TURN = 100_000
WARM_UP, TURNS = 8, 5


def text_of(number: int) -> str:
    """A caption-like text of about 60 bytes."""
    return f"picture {number}: a red fox beside a boat, seen from the river"


class Embeddings:
    """The embedding of text `number` is `pool[number : number + dim]`: all are different, and cost nothing."""

    def __init__(self, num_texts: int, dim: int):
        pool = torch.randn(num_texts + dim, generator=torch.Generator().manual_seed(0)).half()
        self._windows = pool.unfold(0, dim, 1)

    def of(self, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
        """`(len(numbers), dim)` float16."""
        return self._windows[torch.as_tensor(numbers)]


class Texts:
    """All texts in order, made as they are read."""

    def __init__(self, count: int):
        self._count = count

    def __length_hint__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return map(text_of, range(self._count))


def memory() -> dict[str, float]:
    """VmRSS, RssAnon and VmHWM (the most that VmRSS has been) of this process in MB."""
    status, names = Path("/proc/self/status").read_text(), ("VmRSS", "RssAnon", "VmHWM")
    return {name: int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024 / 1e6 for name in names}


def build(path: Path, num_texts: int, dim: int, share: tuple[int, int] = (0, 1)) -> dict[str, float]:
    """Builds or resumes the store at `path`."""
    from trainers.data import TextEmbeddingStore
    from trainers.text_store import build as store_build
    from trainers.text_store import encoding as text_encoding

    embeddings = Embeddings(num_texts, dim)

    def encode(texts: Sequence[str], *args: Any, **kwargs: Any) -> Iterator[Any]:
        numbers = [int(text[8 : text.index(":")]) for text in texts]
        yield text_encoding.EncodedBatch(list(range(len(texts))), embeddings.of(numbers), 0)

    store_build.encode_texts = encode
    text_encoding.encoder_fingerprint = lambda model, processor: {"model": "stand-in"}
    index, count = share
    store = TextEmbeddingStore.build(
        Texts(num_texts), None, None, path, dtype="float16", shard_size=SHARD_SIZE, progress=False,
        process_index=index, num_processes=count,
    )  # fmt: skip
    return {"embedded": store.build_summary.num_new, "seconds": store.build_summary.seconds, **memory()}


def verify(path: Path) -> dict[str, Any]:
    """Verifies the store at `path`."""
    from trainers.text_store.verify import verify_store

    started = time.perf_counter()
    found = verify_store(path, progress=False)
    return {"seconds": time.perf_counter() - started, "num_texts": found.num_texts, "problems": found.problems}


def build_peer(path: Path, num_texts: int, dim: int) -> dict[str, float]:
    """The same rows in LMDB."""
    import lmdb

    from trainers.text_store.keys import text_keys

    embeddings, started = Embeddings(num_texts, dim), time.perf_counter()
    with lmdb.open(str(path), map_size=4 * num_texts * (2 * dim + 100) + (1 << 26)) as environment:
        for begin in range(0, num_texts, SHARD_SIZE):
            numbers = range(begin, min(begin + SHARD_SIZE, num_texts))
            keys = text_keys([text_of(number) for number in numbers])
            values = embeddings.of(numbers).numpy()
            with environment.begin(write=True) as transaction:
                rows = sorted((key.tobytes(), value.tobytes()) for key, value in zip(keys, values))
                transaction.cursor().putmulti(rows)
    return {"embedded": num_texts, "seconds": time.perf_counter() - started, **memory()}


def write_keys(path: Path, num_texts: int) -> dict[str, float]:
    """A store of random keys, and embeddings of one number."""
    from trainers.text_store.layout import make_directory, writer

    make_directory(path)
    random = np.random.default_rng(0)
    with writer(path, 0, 1) as this:
        this.write_settings(1, "float16", {"model": "stand-in"})
        for begin in range(0, num_texts, 1 << 16):
            size = min(1 << 16, num_texts - begin)
            keys = random.integers(-(1 << 63), 1 << 63, (size, 2), dtype=np.int64)
            this.write_shard(torch.zeros(size, 1, dtype=torch.float16), keys)
    return {}


def index_keys(path: Path) -> dict[str, float]:
    """Opens the store at `path`, makes its index, opens it again and finds keys."""
    from trainers.text_store.store import TextEmbeddingStore

    before, started = memory()["VmRSS"], time.perf_counter()
    TextEmbeddingStore(path).index  # noqa: B018
    making, most, started = time.perf_counter() - started, memory()["VmHWM"], time.perf_counter()
    store = TextEmbeddingStore(path)
    store.index  # noqa: B018
    opening = time.perf_counter() - started
    random = np.random.default_rng(1)
    keys = np.concatenate([store.shards[i].read("keys").numpy() for i in random.integers(0, len(store.shards), 8)])
    keys = random.permutation(keys)
    started = time.process_time()
    for begin in range(0, len(keys), BATCH_SIZE):
        if (store.find(keys[begin : begin + BATCH_SIZE]) < 0).any():
            raise SystemExit("a key was not found")
    rate = len(keys) / (time.process_time() - started)
    return {"texts": len(store), "making": making, "before": before, "most": most, "opening": opening, "rate": rate}


class Ours:
    """Look-up in the text store. Imports what a look-up needs, and no more."""

    def __init__(self, path: Path, dim: int):
        from trainers.text_store.store import TextEmbeddingStore

        self.lookup = TextEmbeddingStore(path).lookup


class LMDB:
    """Look-up in LMDB, into a tensor as training needs it."""

    def __init__(self, path: Path, dim: int):
        import lmdb

        from trainers.text_store.keys import text_keys

        self._environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
        self._keys, self._dim = text_keys, dim

    def lookup(self, texts: list[str]) -> torch.Tensor:
        """`(len(texts), dim)` float16."""
        keys = self._keys(texts).tobytes()
        with self._environment.begin(buffers=True) as transaction:
            rows = [transaction.get(keys[begin : begin + 16]) for begin in range(0, len(keys), 16)]
            return torch.frombuffer(bytearray().join(rows), dtype=torch.float16).view(-1, self._dim)


def serve(side: str, path: Path, num_texts: int, dim: int) -> None:
    """Opens the store, then does one turn for every line of the standard input, and tells its times."""
    torch.set_num_threads(1)
    before, embeddings = memory(), Embeddings(num_texts, dim)
    started = time.perf_counter()
    store = (Ours if side == "ours" else LMDB)(path, dim)
    store.lookup([text_of(0)])
    opening = time.perf_counter() - started
    random = np.random.default_rng(1)
    for _ in sys.stdin:
        clock = cpu = 0.0
        for begin in range(0, ROWS_A_TURN, BATCH_SIZE):
            numbers = random.integers(0, num_texts, min(BATCH_SIZE, ROWS_A_TURN - begin))
            texts = [text_of(number) for number in numbers.tolist()]
            clock, cpu = clock - time.perf_counter(), cpu - time.process_time()
            found = store.lookup(texts)
            clock, cpu = clock + time.perf_counter(), cpu + time.process_time()
            if not torch.equal(found, embeddings.of(numbers)):
                raise SystemExit(f"{side} found other embeddings")
        answer = {"opening": opening, "rate": ROWS_A_TURN / clock, "cpu_rate": ROWS_A_TURN / cpu, "before": before}
        print(json.dumps({**answer, **memory()}), flush=True)


def child(*arguments: Any, **options: Any) -> subprocess.Popen:
    """This program in a process of its own, for one step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--step", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)


def result_of(process: subprocess.Popen) -> dict[str, Any]:
    """What a step printed."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a step ended with code {process.returncode}")
    return json.loads(output.splitlines()[-1])


def build_killed_and_resumed(path: Path, num_texts: int, dim: int) -> dict[str, Any]:
    """Kills the builder at 40 % of the shards, and lets another one finish."""
    started = time.perf_counter()
    killed = child("build", path, num_texts, dim)
    target = max(num_texts // SHARD_SIZE * 2 // 5, 1)
    while len(list(path.glob("shard-*.safetensors"))) < target:
        if killed.poll() is not None:
            raise SystemExit("the builder was done before it could be killed: take more texts")
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    seconds = time.perf_counter() - started
    left = len(list(path.glob("shard-*.safetensors")))
    resumed = result_of(child("build", path, num_texts, dim))
    if resumed["embedded"] + min(left * SHARD_SIZE, num_texts) != num_texts:
        raise SystemExit(f"after {left} shards, resuming embedded {resumed['embedded']} texts")
    print(
        f"killed after {left} shards and {seconds:.1f} s; resuming embedded {resumed['embedded']:,} texts", flush=True
    )
    return {**resumed, "left": left}


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    """Runs the benchmark, or one step of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-texts", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=576, help="of SmolLM2-135M")
    parser.add_argument("--index-texts", type=int, default=0, help="texts of the store whose index is measured")
    parser.add_argument("--folder", type=Path, help="for the stores; a temporary one by default")
    parser.add_argument("--json", type=Path, help="write the table there")
    parser.add_argument("--step", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, path, *numbers = arguments.step
        path, numbers = Path(path), [int(number) for number in numbers]
        if step in ("ours", "lmdb"):
            return serve(step, path, *numbers)
        steps = {
            "build": build,
            "verify": verify,
            "build-lmdb": build_peer,
            "write-keys": write_keys,
            "index": index_keys,
        }
        print(json.dumps(steps[step](path, *numbers)))
        return

    scratch = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        sizes = arguments.num_texts, arguments.dim
        built = build_killed_and_resumed(scratch / "ours", *sizes)
        verified = result_of(child("verify", scratch / "ours"))
        if verified["problems"] or verified["num_texts"] != sizes[0]:
            raise SystemExit(f"the store is not sound: {verified}")
        print(f"verified in {verified['seconds']:.1f} s", flush=True)
        peer_built = result_of(child("build-lmdb", scratch / "lmdb", *sizes))
        turns: dict[str, list[dict[str, Any]]] = {"ours": [], "lmdb": []}
        servers = {side: child(side, scratch / side, *sizes, stdin=subprocess.PIPE) for side in turns}
        for turn in range(
            WARM_UP + TURNS
        ):  # the first ones bring the files into the page cache, and the pages of the index into memory
            for side, server in servers.items():
                server.stdin.write("turn\n")
                server.stdin.flush()
                turns[side].append(json.loads(server.stdout.readline()))
            print(
                f"turn {turn}: "
                + ", ".join(f"{side} {done[-1]['cpu_rate']:,.0f} rows/s" for side, done in turns.items()),
                flush=True,
            )
        for server in servers.values():
            server.stdin.close()
            server.wait()
        on_disk = {side: sum(file.stat().st_size for file in (scratch / side).rglob("*")) / 1e6 for side in turns}
        indexed = None
        if arguments.index_texts:
            result_of(child("write-keys", scratch / "keys", arguments.index_texts))
            indexed = result_of(child("index", scratch / "keys"))
            print(
                "index of {texts:,} texts: made in {making:.1f} s with {most:.0f} MB at most ({before:.0f} MB before), opened in "
                "{opening:.2f} s, {rate:,.0f} keys/s found".format(**indexed)
            )
    finally:
        shutil.rmtree(scratch)

    def row(name: str, unit: str, ours: float, peer: float, more_is_better: bool) -> dict[str, Any]:
        ratio = ours / peer if more_is_better else peer / ours
        return {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "unit": unit}

    def median(side: str, name: str) -> float:
        return statistics.median(turn[name] for turn in turns[side][WARM_UP:])

    last = {side: done[-1] for side, done in turns.items()}
    rows = [
        row("random look-up", "rows/s of one core", median("ours", "cpu_rate"), median("lmdb", "cpu_rate"), True),
        row("random look-up by the clock", "rows/s", median("ours", "rate"), median("lmdb", "rate"), True),
        row("resident memory", "MB", last["ours"]["VmRSS"], last["lmdb"]["VmRSS"], False),
        row("of it the process's own", "MB", last["ours"]["RssAnon"], last["lmdb"]["RssAnon"], False),
        row("opening and the first look-up", "s", last["ours"]["opening"], last["lmdb"]["opening"], False),
        row("on the disk", "MB", on_disk["ours"], on_disk["lmdb"], False),
        row(
            "building, the encoder's time left out",
            "rows/s",
            built["embedded"] / built["seconds"],
            peer_built["embedded"] / peer_built["seconds"],
            True,
        ),
    ]
    for entry in rows:
        print("{name:38} ours {ours:11,.3f}   lmdb {peer:11,.3f}   ratio {ratio:6.2f}   {unit}".format(**entry))
    settings = {
        "num_texts": sizes[0],
        "dim": sizes[1],
        "dtype": "float16",
        "shards_when_killed": built["left"],
        "verified_in_seconds": verified["seconds"],
        "index": indexed,
        "resident_before_opening": {side: done["before"]["VmRSS"] for side, done in last.items()},
    }
    print(f"resident before opening: {settings['resident_before_opening']}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
