"""The quickstart's table and pictures, from its results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .emoji_pictures import render
from .plots import plot_languages, plot_losses, plot_retrieval
from .task import Task


NAMES = {
    "clip": "CLIP",
    "lit": "LiT",
    "llm2clip": "LLM2CLIP",
    "proclip-stage1": "ProCLIP, stage 1",
    "proclip": "ProCLIP",
}
COLUMNS = {
    "zero_shot_seen": "zero-shot\nseen",
    "zero_shot_unseen": "zero-shot\nunseen",
    "i2t_r@1": "image→text\nR@1",
    "t2i_r@1": "text→image\nR@1",
}


def print_table(console: Console, results: Mapping[str, Any]) -> None:
    """Print one row a model, in percent; the languages other than English as their mean."""
    table = Table(title="ProCLIP on OpenMoji (%)", title_justify="left")
    table.add_column("model")
    for title in (*COLUMNS.values(), "13 other\nlanguages"):
        table.add_column(title, justify="right")
    table.add_column("training")
    for row in results["rows"]:
        others = [value for language, value in row["zero_shot_by_language"].items() if language != "en"]
        values = [*(row[key] for key in COLUMNS), sum(others) / len(others)]
        table.add_row(NAMES[row["model"]], *(f"{100 * value:.1f}" for value in values), row["budget"])
    console.print(table)
    console.print(
        f"Zero-shot: new pictures, {results['num_concepts']} classes; alignment saw pictures of {results['num_seen']} of them. Retrieval: "
        f"{results['num_retrieval_pictures']} pictures. Other languages: {results['num_language_concepts']} classes, chance "
        f"{100 / results['num_language_concepts']:.1f} %.",
        style="dim",
    )


def write_pictures(
    folder: Path,
    task: Task,
    results: Mapping[str, Any],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    rankings: Mapping[str, Sequence[Sequence[int]]],
) -> None:
    """
    Write `loss_curves.png`, `languages.png` and `retrieval.png` to `folder`.

    Args:
        folder: Where to.
        task: The task, to draw its pictures large.
        results: As in `results.json`.
        curves: Title of a training run -> its (step, loss) points.
        rankings: "CLIP" and "ProCLIP" -> for each of `task.example_queries` the indices in `task.retrieval` that it finds first.
    """
    plot_losses(curves, folder / "loss_curves.png")
    by_model = {row["model"]: row["zero_shot_by_language"] for row in results["rows"]}
    plot_languages(
        {model: by_model[model] for model in ("clip", "llm2clip", "proclip")},
        1 / results["num_language_concepts"],
        folder / "languages.png",
    )
    rows = []
    for query, first, second in zip(task.example_queries, rankings["CLIP"], rankings["ProCLIP"], strict=True):
        found = [
            [
                (render(task.concepts[p.concept], p.view, side=112), index == query)
                for index in ranking
                for p in [task.retrieval[index]]
            ]
            for ranking in (first, second)
        ]
        rows.append((task.retrieval[query].long, *found))
    plot_retrieval(rows, folder / "retrieval.png")
