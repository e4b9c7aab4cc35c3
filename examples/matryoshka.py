"""Score against the size of an embedding, on the quickstart's data: with `matryoshka_dims` in both stages and without; float32, int8, binary.

    python examples/matryoshka.py --output quickstart-output --seeds 0 1 --json docs/smaller_embeddings_results.json

Task, models and settings are those of `proclip quickstart`, whose output directory lends its text stores. A seed trains ProCLIP twice, stages 1
and 2. Images are stored in each precision, as an index stores them, and texts are queries in float32.
"""

import argparse
import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from trainers.compute.precision import unit_length
from trainers.compute.quantization import Precision, Quantization
from trainers.quickstart.evaluate import embed_images, score
from trainers.quickstart.run import Quickstart


DIMS = (128, 64, 32, 16, 8)
PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "binary")
METRICS = ("zero_shot_seen", "zero_shot_unseen", "i2t_r@1", "t2i_r@1")


def train(output: Path, seed: int, size: str) -> Iterator[dict[str, Any]]:
    """The rows of the teacher, of ProCLIP, and of ProCLIP with nested prefixes."""
    run = Quickstart(output, size, seed)
    run.draw()
    run.pair_with_llm()
    run.build_stores()
    yield from sizes(run, "clip", embed_images(run.clip, run.test_pixels), run.teacher_store.lookup)
    for name, dims in (("proclip", None), ("proclip, matryoshka_dims", list(DIMS[1:]))):
        model = run.inherit(run.untrained(), matryoshka_dims=dims)
        model = run.tune(model, "proclip", f"{name}, stage 2", run.size.tuning_steps, matryoshka_dims=dims)
        yield from sizes(run, name, *run.encode(model))


def sizes(run: Quickstart, model: str, images: torch.Tensor, embed_texts: Any) -> Iterator[dict[str, Any]]:
    """A row for each size and precision of the image embeddings `(num_images, projection_dim)`."""
    for dim in DIMS:
        prefixes = unit_length(images[:, :dim])
        embed_queries = functools.partial(embed_prefixes, embed_texts, dim)
        for precision in PRECISIONS:
            stored = Quantization.calibrated(precision, prefixes)
            found = score(run.task, stored.decode(stored.encode(prefixes)), embed_queries)
            yield {
                "model": model,
                "seed": run.seed,
                "dim": dim,
                "precision": precision,
                "bytes": stored.num_bytes,
                **{metric: found[metric] for metric in METRICS},
            }


def embed_prefixes(embed_texts: Callable[[list[str]], torch.Tensor], dim: int, texts: list[str]) -> torch.Tensor:
    return unit_length(embed_texts(texts)[:, :dim])


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, in percent, as Markdown; after each score the difference to the same model's whole float32 embedding."""
    of_row = defaultdict(list)
    for row in rows:
        of_row[row["model"], row["dim"], row["precision"]].append(row)
    lines = [
        "| model | dimensions | precision | bytes | seen | unseen | I→T | T→I |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for (model, dim, precision), found in of_row.items():
        whole = of_row[model, DIMS[0], "float32"]
        cells = []
        for metric in METRICS:
            value, best = (100 * mean(row[metric] for row in some) for some in (found, whole))
            cells.append(f"{value:.1f}" + ("" if found is whole else f" ({value - best:+.1f})"))
        lines.append(f"| {model} | {dim} | {precision} | {found[0]['bytes']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart-output"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size", choices=("small", "full"), default="full")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        rows += train(arguments.output, seed, arguments.size)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
