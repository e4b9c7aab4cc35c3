"""Recall@1/5/10 in both directions at Flickr30k's full size, and against `clip_benchmark.metrics.zeroshot_retrieval` on the largest size that it can do.

    pip install --no-deps clip-benchmark
    python benchmarks/retrieval.py --json results.json

Embeddings are random, 512-dimensional, five captions a picture. `retrieval_recall` runs at full size in a process of its own, whose peak of resident
memory is measured. The peer keeps all scores, and for every k a one-hot array of batch x k x candidates; its largest size here is the one for which
its own time on a tenth of that and the size of its arrays promise to stay below --peer-gigabytes and --peer-seconds. It runs its own `evaluate`
once with the batch size of its command line (64) and once with the one that is fastest for it here; `retrieval_recall` on the same embeddings runs
before and after each, and the mean counts. The recalls of both must be the same. On a machine that does other work too, compare by processor time, with
`--threads 1`.
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any


# As `proclip` does: threads that wait for each other sleep. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F

from trainers.evaluation import retrieval_recall


CAPTIONS, DIM, KS = 5, 512, (1, 5, 10)
PEER_DEFAULT_BATCH = 64
PEER_BATCHES = (4, 8, 16, 32, 64)


def make_embeddings(num_images: int, strength: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random unit-length embeddings of pictures and captions, and the picture of each caption.

    Args:
        num_images: how many pictures; each has five captions.
        strength: share of its picture in a caption. 0: recalls of chance; 0.15: about those of a good model.
    """
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(num_images, DIM, generator=generator), dim=-1)
    text_to_image = torch.arange(num_images).repeat_interleave(CAPTIONS)
    texts = F.normalize(torch.randn(len(text_to_image), DIM, generator=generator), dim=-1)
    if strength:
        for rows in torch.arange(len(texts)).split(8192):
            texts[rows] = F.normalize(texts[rows] + strength * images[text_to_image[rows]], dim=-1)
    return images, texts, text_to_image


class Clock:
    """Seconds by the clock and of processor time since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "seconds": time.perf_counter() - self._started[0],
            "cpu_seconds": time.process_time() - self._started[1],
        }


def run_ours(num_images: int, strength: float, threads: int) -> dict[str, Any]:
    """In a fresh process: seconds, peak of resident memory in bytes, and the recalls."""
    torch.set_num_threads(threads)
    images, texts, text_to_image = make_embeddings(num_images, strength)
    clock = Clock()
    recalls = retrieval_recall(images, texts, text_to_image, KS)
    timing = clock.read()
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {**timing, "peak_bytes": peak, "recalls": recalls}


class _Identity:
    """A model whose inputs are embeddings already, as the peer's `evaluate` takes one."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def encode_text(self, texts: torch.Tensor) -> torch.Tensor:
        return texts


def run_peer(images: torch.Tensor, texts: torch.Tensor, batch_size: int) -> tuple[dict[str, float], dict[str, float]]:
    """Time of the peer's own `evaluate`, and its recalls under our names."""
    from clip_benchmark.metrics import zeroshot_retrieval as peer

    peer.tqdm = lambda batches: batches  # no bar
    captions = texts.view(len(images), CAPTIONS, DIM)
    batches = [
        (images[i : i + batch_size], captions[i : i + batch_size].unbind()) for i in range(0, len(images), batch_size)
    ]
    clock = Clock()
    found = peer.evaluate(_Identity(), batches, torch.stack, "cpu", amp=False, recall_k_list=list(KS))
    timing = clock.read()
    names = {"text_retrieval_recall": "i2t_r", "image_retrieval_recall": "t2i_r"}
    return timing, {f"{names[name.split('@')[0]]}@{name.split('@')[1]}": value for name, value in found.items()}


def time_ours(
    images: torch.Tensor, texts: torch.Tensor, text_to_image: torch.Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """Time of `retrieval_recall`, and its recalls."""
    clock = Clock()
    recalls = retrieval_recall(images, texts, text_to_image, KS)
    return clock.read(), recalls


def peer_bytes(num_images: int, batch_size: int) -> int:
    """What the peer's arrays take at their largest: scores and positives, and one-hot with its product for one batch of pictures."""
    num_texts = num_images * CAPTIONS
    return num_images * num_texts * 5 + 2 * 8 * batch_size * max(KS) * num_texts


def largest_peer_size(seconds_of_thousand: float, batch_size: int, gigabytes: float, seconds: float) -> int:
    """Pictures, in steps of 500, that the peer can do within the limits, by its time for 1,000 pictures."""
    size = 1000
    while (
        peer_bytes(size + 500, batch_size) < gigabytes * 1e9
        and seconds_of_thousand * ((size + 500) / 1000) ** 2 < seconds
    ):
        size += 500
    return size


def compare(
    batch_size: int, seconds_of_thousand: float, gigabytes: float, seconds: float, strength: float
) -> list[dict[str, Any]]:
    """Both on the peer's largest size for `batch_size`; asserts that the recalls are the same."""
    size = largest_peer_size(seconds_of_thousand, batch_size, gigabytes, seconds)
    images, texts, text_to_image = make_embeddings(size, strength)
    before, ours = time_ours(images, texts, text_to_image)
    print(f"  clip_benchmark, batch {batch_size}, {size:,} pictures x {len(texts):,} captions ...", flush=True)
    peer_time, peer = run_peer(images, texts, batch_size)
    after, _ = time_ours(images, texts, text_to_image)
    for name, value in ours.items():
        # The peer's mean is a float32.
        if abs(value - peer[name]) > 1e-6:
            raise SystemExit(f"the recalls differ: {name} is {value} here and {peer[name]} there")
    name = f"both directions, {size:,} x {len(texts):,}, its batch {batch_size}"
    rows = []
    for key, unit in (("seconds", "s"), ("cpu_seconds", "s of processor time")):
        mean = (before[key] + after[key]) / 2
        rows.append(
            {"name": name, "ours": mean, "peer": peer_time[key], "ratio": peer_time[key] / mean, "unit": unit}
            | {"recalls": ours}
        )
    return rows


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    """Runs the comparison, prints its table and writes it to the file named by --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--num-images", type=int, default=31_783, help="of the full size; five captions each")
    parser.add_argument("--strength", type=float, default=0.0, help="share of its picture in a caption (0: chance)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-gigabytes", type=float, default=8.0)
    parser.add_argument("--peer-seconds", type=float, default=120.0)
    parser.add_argument("--no-peer", action="store_true", help="the full size only")
    arguments = parser.parse_args()
    if not arguments.no_peer:
        try:
            import clip_benchmark.metrics.zeroshot_retrieval  # noqa: F401
        except ImportError as error:
            raise SystemExit(f"{error}: pip install --no-deps clip-benchmark, or give --no-peer") from error

    num_texts = arguments.num_images * CAPTIONS
    print(
        f"{arguments.num_images:,} pictures x {num_texts:,} captions, {DIM} dimensions, {arguments.threads} threads",
        flush=True,
    )
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        full = pool.submit(run_ours, arguments.num_images, arguments.strength, arguments.threads).result()
    print(
        f"  {full['seconds']:.1f} s ({full['cpu_seconds']:.1f} s of processor time), peak {full['peak_bytes'] / 1e9:.2f} GB; "
        + ", ".join(f"{name} {100 * value:.3f} %" for name, value in full["recalls"].items()),
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    if not arguments.no_peer:
        torch.set_num_threads(arguments.threads)
        images, texts, _ = make_embeddings(1000, arguments.strength)
        run_peer(images[:100], texts[:500], 16)
        found = {batch: run_peer(images, texts, batch)[0]["seconds"] for batch in PEER_BATCHES}
        print("  clip_benchmark, 1,000 pictures, by batch:", {b: f"{s:.2f} s" for b, s in found.items()}, flush=True)
        for batch in dict.fromkeys((PEER_DEFAULT_BATCH, min(found, key=found.__getitem__))):
            rows += compare(batch, found[batch], arguments.peer_gigabytes, arguments.peer_seconds, arguments.strength)
    for entry in rows:
        print(
            "{name:55} ours {ours:8.2f} {unit}   clip_benchmark {peer:8.2f} {unit}   ratio {ratio:6.1f}".format(
                **entry
            )
        )
    if arguments.json:
        settings = {"captions": CAPTIONS, "dim": DIM, "ks": KS, "strength": arguments.strength}
        full_size = {"num_images": arguments.num_images, "num_texts": num_texts, **full}
        table = {"machine": machine(arguments.threads), "settings": settings, "full_size": full_size, "rows": rows}
        arguments.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
