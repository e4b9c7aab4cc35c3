"""Search in an index of many images, by precision of the stored embeddings: time to build and to search, memory, disk, and recall.

    pip install "proclip-transformers[search]"
    python benchmarks/search.py --images 1000000 --dim 512 --json search.json

Embeddings are synthetic: unit vectors around 1,000 random centers, as images of 1,000 subjects would lie. A query is a center with noise on it. Recall is
the share of the ten nearest embeddings, found by comparing every one in float32, that a search returns. Each precision runs in a process of its
own. The peer is the exact search in float32.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import torch

from trainers.compute.quantization import Precision, Quantization
from trainers.search.query import search
from trainers.search.table import ImageIndex


CENTERS, BATCH, TOP = 1000, 20_000, 10
CALIBRATED = 256  # embeddings that give int8 its ranges, as in `proclip index`
HEADER = ("search", "query, ms", "recall@10", "rows, s", "index, s", "memory, MB", "disk, MB")


class Synthetic:
    """Embeddings around centers, and queries, that are the same in every process."""

    def __init__(self, count: int, dim: int, num_queries: int):
        self.count, self.dim = count, dim
        generator = np.random.default_rng(0)
        self._centers = unit(generator.standard_normal((CENTERS, dim), dtype=np.float32))
        self.queries = self._near(num_queries, generator)

    def batches(self) -> Iterator[tuple[int, np.ndarray]]:
        """The first row's number and `(size, dim)` float32, again and again the same."""
        generator = np.random.default_rng(1)
        for start in range(0, self.count, BATCH):
            yield start, self._near(min(BATCH, self.count - start), generator)

    def _near(self, size: int, generator: np.random.Generator) -> np.ndarray:
        noise = generator.standard_normal((size, self.dim), dtype=np.float32) / self.dim**0.5
        return unit(self._centers[generator.integers(0, CENTERS, size)] + noise)

    def nearest(self) -> list[set[str]]:
        """Paths of the [`TOP`] nearest of each query, by comparing all."""
        scores = np.full((len(self.queries), TOP), -np.inf, np.float32)
        numbers = np.zeros((len(self.queries), TOP), np.int64)
        for start, embeddings in self.batches():
            scores = np.concatenate([scores, self.queries @ embeddings.T], axis=1)
            numbers = np.concatenate(
                [numbers, np.tile(np.arange(start, start + len(embeddings)), (len(numbers), 1))], 1
            )
            best = np.argpartition(-scores, TOP, axis=1)[:, :TOP]
            scores, numbers = (np.take_along_axis(values, best, 1) for values in (scores, numbers))
        return [{path(number) for number in row} for row in numbers]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def path(number: int) -> str:
    return f"{number:09}.jpg"


def fill(index: ImageIndex, data: Synthetic) -> None:
    """Writes a row for every embedding, with nothing but its path."""
    schema = index.images.schema
    for start, embeddings in data.batches():
        codes = index.quantization.encode(torch.from_numpy(embeddings))
        columns = {name: pa.nulls(len(codes), schema.field(name).type) for name in schema.names}
        columns["path"] = pa.array([path(start + i) for i in range(len(codes))])
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), codes.shape[1])
        index.images.add(pa.table(columns, schema=schema))


def measure(
    precision: Precision, data: Synthetic, nearest: list[set[str]], folder: Path | None
) -> list[dict[str, Any]]:
    """A row for the approximate search, where this precision has one, and a row for the exact search."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        index = ImageIndex.create(Path(scratch), Path(scratch), "synthetic", {}, data.dim, precision)
        _, first = next(data.batches())
        index.calibrate(Quantization.calibrated(precision, torch.from_numpy(first[:CALIBRATED])), CALIBRATED)
        start = time.perf_counter()
        fill(index, data)
        written = time.perf_counter()
        index.approximate()
        built = time.perf_counter()
        size = sum(file.stat().st_size for file in Path(scratch).rglob("*") if file.is_file())
        rows = []
        for exact in (False, True) if precision != "int8" else (True,):
            seconds, recalls = [], []
            search(index, torch.from_numpy(data.queries[0]), top=TOP, exact=exact)  # opens the files
            for query, expected in zip(data.queries, nearest, strict=True):
                began = time.perf_counter()
                found = search(index, torch.from_numpy(query), top=TOP, columns=["path"], exact=exact)
                seconds.append(time.perf_counter() - began)
                recalls.append(len(expected & {row["path"] for row in found}) / TOP)
            rows.append(
                {
                    "search": f"{precision}, {'exact' if exact else 'approximate'}",
                    "query, ms": 1000 * statistics.median(seconds),
                    "recall@10": statistics.mean(recalls),
                    "rows, s": written - start,
                    "index, s": None if exact else built - written,
                    "memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
                    "disk, MB": size / 1e6,
                }
            )
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="rows of the index (default 100,000)")
    parser.add_argument("--dim", type=int, default=768, help="size of an embedding (default 768, as of ViT-L/14)")
    parser.add_argument("--queries", type=int, default=30, help="queries (default 30)")
    parser.add_argument("--precisions", nargs="*", choices=get_args(Precision), default=get_args(Precision))
    parser.add_argument("--folder", type=Path, help="where the index is written (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    args = parser.parse_args()
    data = Synthetic(args.images, args.dim, args.queries)
    nearest = data.nearest()
    print(f"{args.images:,} images, {args.dim} dimensions, {os.cpu_count()} cores")
    print(f"{HEADER[0]:22}" + "".join(f"{name:>12}" for name in HEADER[1:]))
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    for precision in args.precisions:
        with ProcessPoolExecutor(1, context) as process:  # for a peak of memory of its own
            for row in process.submit(measure, precision, data, nearest, args.folder).result():
                values = ("–" if row[name] is None else f"{row[name]:,.3g}" for name in HEADER[1:])
                print(f"{row['search']:22}" + "".join(f"{value:>12}" for value in values), flush=True)
                rows.append(row)
    if args.json:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        machine |= {"images": args.images, "dim": args.dim}
        args.json.write_text(json.dumps({"machine": machine, "rows": flat(rows)}, indent=1) + "\n")


def flat(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every number; smaller is better, but for recall."""
    peer = next((row for row in rows if row["search"] == "float32, exact"), {})
    flat = []
    for row in rows:
        for name in HEADER[1:]:
            ours, theirs = row[name], peer.get(name)
            ratio = None
            if ours is not None and theirs is not None:
                ratio = ours / theirs if name == "recall@10" else theirs / ours
            flat.append(
                {"name": f"{row['search']}: {name}", "ours": ours, "peer": theirs, "ratio": ratio, "unit": name}
            )
    return flat


if __name__ == "__main__":
    main()
