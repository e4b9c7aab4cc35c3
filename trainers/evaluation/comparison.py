"""What needs several models at once: CKA between two image encoders, and retrieval examples side by side."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from trainers.display.progress import track
from trainers.evaluation.report.examples import Retrieved, retrieval_examples
from trainers.evaluation.scoring.cka import cka_by_layer
from trainers.evaluation.scoring.embedding import decode
from trainers.evaluation.scoring.encoders import Encoder
from trainers.evaluation.scoring.tasks import Outcome, Task
from trainers.storage.files import write_file


def score_cka(task: Task, encoder: Encoder, baseline: Encoder, batch_size: int, progress: bool) -> Outcome:
    """CKA between the image encoders of two models on the images of `task`, by layer. Images are decoded again, because the cache holds no hidden states."""
    (column,) = task.image_columns
    rows = range(len(task.data.rows))

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in track(range(0, len(rows), batch_size), f"{task.manifest.name}: CKA", "batches", shown=progress):
            images = [decode(task, column, row) for row in rows[start : start + batch_size]]
            yield _pixels(encoder, images), _pixels(baseline, images)

    try:
        layers = cka_by_layer(encoder.model, baseline.model, batches())
    except ValueError as error:
        raise ValueError(f"benchmark {task.manifest.name}: {error}") from error
    last = layers[-1]
    metrics = {name: float(last[name]) for name in ("cka_debiased", "cka")}
    return Outcome(metrics, {}, details={"layers": layers, "baseline": baseline.name})


def write_examples(folder: Path, task: Task, retrieved: Sequence[Retrieved], seed: int) -> None:
    """Writes the examples of one retrieval benchmark to `folder/examples.json`, in place of its earlier ones. `retrieved` is what every model found: the
    model whose results folder it is, its baseline, other models.
    """
    (column,) = task.image_columns
    path = folder / "examples.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    kept = [example for example in kept if example["task"] != task.manifest.name]
    model, *rest = retrieved
    baseline = rest[0] if rest else None
    if baseline is not None and baseline.model == model.model:
        baseline = dataclasses.replace(baseline, model=f"{baseline.model} (baseline)")
    drawn = retrieval_examples(
        task.manifest.name,
        task.texts,
        torch.tensor(task.identity),
        [model, *rest[1:]],
        lambda row: decode(task, column, row),
        seed,
        baseline,
    )
    write_file(path, (json.dumps(kept + drawn, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))


def _pixels(encoder: Encoder, images: list) -> torch.Tensor:
    inputs = encoder.prepare_images(images)
    if set(inputs) != {"pixel_values"}:
        raise ValueError(
            f"CKA takes images of one size, and the processor of {encoder.name} gives {', '.join(inputs)}."
        )
    return inputs["pixel_values"].to(encoder.device, encoder.dtype)
