"""Search in an index of many images: how long it takes to build, to ask exactly and approximately, how much memory, and how many of the ten nearest
the approximate index finds.

    pip install "proclip-transformers[search]"
    python benchmarks/search.py --images 1000000 --json search.json

Embeddings are synthetic: unit vectors around 1,000 random centres, as images of 1,000 subjects would lie. A question is an embedding with noise on it.
The peer is the exact search, which compares the question with every embedding.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from lancedb.index import IvfSq

from trainers.search.query import search
from trainers.search.table import ImageIndex


CENTRES, BATCH = 1000, 20_000


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def fill(index: ImageIndex, count: int, dim: int, centres: np.ndarray, generator: np.random.Generator) -> None:
    """Writes `count` rows with embeddings around the centres."""
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        spread = generator.standard_normal((size, dim), dtype=np.float32) / dim**0.5
        embeddings = unit(centres[generator.integers(0, CENTRES, size)] + spread)
        columns = {"path": [f"{start + i:09}.jpg" for i in range(size)]}
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), dim)
        missing = [name for name in index.images.schema.names if name not in columns]
        columns |= {name: pa.nulls(size, index.images.schema.field(name).type) for name in missing}
        index.images.add(
            pa.table({name: columns[name] for name in index.images.schema.names}, schema=index.images.schema)
        )


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="rows of the index (default 100,000)")
    parser.add_argument("--dim", type=int, default=768, help="size of an embedding (default 768, as of ViT-L/14)")
    parser.add_argument("--questions", type=int, default=50, help="questions asked (default 50)")
    parser.add_argument("--folder", type=Path, help="where the index is written (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    args = parser.parse_args()
    generator = np.random.default_rng(0)
    centres = unit(generator.standard_normal((CENTRES, args.dim), dtype=np.float32))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        index = ImageIndex.create(Path(folder) / "index", Path(folder), "synthetic", {}, args.dim)
        writing = timed(lambda: fill(index, args.images, args.dim, centres, generator))
        building = timed(lambda: index.images.create_index("embedding", config=IvfSq(distance_type="cosine")))
        noise = generator.standard_normal((args.questions, args.dim), dtype=np.float32) / args.dim**0.5
        questions = torch.from_numpy(unit(centres[generator.integers(0, CENTRES, args.questions)] + noise))
        seconds: dict[bool, list[float]] = {True: [], False: []}
        found: dict[bool, list[set[str]]] = {True: [], False: []}
        for exact in (True, False):
            search(index, questions[0], top=10, exact=exact)  # opens the files
            for question in questions:
                start = time.perf_counter()
                rows = search(index, question, top=10, columns=["path"], exact=exact)
                seconds[exact].append(time.perf_counter() - start)
                found[exact].append({row["path"] for row in rows})
        recall = statistics.mean(len(a & b) / len(a) for a, b in zip(found[True], found[False]))
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    exact_ms, approximate_ms = (1000 * statistics.median(seconds[exact]) for exact in (True, False))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    rows = [
        {
            "name": "a question",
            "ours": approximate_ms,
            "peer": exact_ms,
            "ratio": exact_ms / approximate_ms,
            "unit": "ms",
        },
        {"name": "recall@10", "ours": recall, "peer": 1.0, "ratio": recall, "unit": "of the exact ten"},
        {"name": "rows written", "ours": writing, "peer": None, "ratio": None, "unit": "s"},
        {"name": "approximate index built", "ours": building, "peer": None, "ratio": None, "unit": "s"},
        {"name": "peak memory", "ours": peak, "peer": None, "ratio": None, "unit": "MB"},
        {"name": "on the disk", "ours": size / 1e6, "peer": None, "ratio": None, "unit": "MB"},
    ]
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "images": args.images,
        "dim": args.dim,
    }
    print(f"{args.images:,} images, {args.dim} dimensions, {os.cpu_count()} cores")
    for row in rows:
        peer = f"  (exact: {row['peer']:,.3g}, {row['ratio']:.3g} times)" if row["peer"] is not None else ""
        print(f"{row['name']:24} {row['ours']:10,.3g} {row['unit']}{peer}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
