"""The quickstart's table and plots, from its results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from hub_cards.measurements import precision
from trainers.openmoji.images import render
from trainers.openmoji.task import Task

from .plots import plot_languages, plot_losses, plot_retrieval


NAMES = {
    "clip": "CLIP",
    "lit": "LiT",
    "llm2clip": "LLM2CLIP",
    "proclip-stage1": "ProCLIP, stage 1",
    "proclip": "ProCLIP",
}
COLUMNS = {"zero_shot_seen": "seen", "zero_shot_unseen": "unseen", "i2t_r@1": "I→T", "t2i_r@1": "T→I"}


def print_table(console: Console, results: Mapping[str, Any]) -> None:
    """Print one row a model, in percent; the languages other than English as their mean."""
    table = Table(title="ProCLIP on OpenMoji, in percent", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("model", no_wrap=True)
    for title in (*COLUMNS.values(), "others"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("training", no_wrap=True)
    for row in results["rows"]:
        others = [value for language, value in row["zero_shot_by_language"].items() if language != "en"]
        values = [*(row[key] for key in COLUMNS), sum(others) / len(others)]
        table.add_row(NAMES[row["model"]], *(f"{100 * value:.1f}" for value in values), row["budget"])
    console.print(table)
    console.print(
        f"seen, unseen: zero-shot top-1 on new images, {results['num_concepts']} classes; the alignment saw images of {results['num_seen']} "
        f"of them.\nI→T, T→I: recall@1 of image-to-text and text-to-image retrieval, {results['num_retrieval_pictures']} images.\n"
        f"others: zero-shot in 13 other languages, {results['num_language_concepts']} classes, chance "
        f"{100 / results['num_language_concepts']:.1f}.\nComputed with {precision(results['protocol'])}.",
        style="dim",
        soft_wrap=True,
    )


def write_plots(
    folder: Path,
    task: Task,
    results: Mapping[str, Any],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    rankings: Mapping[str, Sequence[Sequence[int]]],
) -> None:
    """Write `loss_curves.png`, `languages.png` and `retrieval.png` to `folder`.

    Args:
        folder: Where to.
        task: The task, to draw its images large.
        results: As in `results.json`.
        curves: Title of a training run -> its (step, loss) points.
        rankings: "CLIP" and "ProCLIP" -> for each of `task.example_queries` the indices in `task.retrieval` that it finds first.
    """
    plot_losses(curves, folder / "loss_curves.png")
    by_model = {row["model"]: row["zero_shot_by_language"] for row in results["rows"]}
    plot_languages(
        {model: by_model[model] for model in ("clip", "llm2clip", "proclip")},
        NAMES,
        1 / results["num_language_concepts"],
        folder / "languages.png",
    )

    def found(query: int, ranking: Sequence[int]) -> list[tuple[Image.Image, bool]]:
        images = [task.retrieval[index] for index in ranking]
        drawings = [render(task.concepts[image.concept], image.view, side=112) for image in images]
        return list(zip(drawings, [index == query for index in ranking], strict=True))

    plot_retrieval(
        [
            (task.retrieval[query].long, found(query, first), found(query, second))
            for query, first, second in zip(task.example_queries, rankings["CLIP"], rankings["ProCLIP"], strict=True)
        ],
        folder / "retrieval.png",
    )
