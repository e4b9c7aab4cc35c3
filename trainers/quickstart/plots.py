"""The quickstart's plots: loss curves, zero-shot by language, retrieval examples."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from PIL import Image


matplotlib.use("Agg")
from matplotlib import pyplot as plt


COLORS = {
    "clip": "#888888",
    "lit": "#8fbcd4",
    "llm2clip": "#e2a04a",
    "proclip-stage1": "#9bc49b",
    "proclip": "#2f7d4f",
}


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def plot_losses(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """One panel a training run.

    Args:
        curves: Title of the run -> its (step, loss) points.
        path: PNG file to write.
    """
    figure, axes = plt.subplots(1, len(curves), figsize=(3.4 * len(curves), 2.8), squeeze=False)
    for axis, (title, points) in zip(axes[0], curves.items(), strict=True):
        axis.plot(*zip(*points, strict=True), color=COLORS["proclip"], linewidth=1.5)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("training loss")
    figure.tight_layout()
    _save(figure, path)


def plot_languages(
    by_model: Mapping[str, Mapping[str, float]], names: Mapping[str, str], chance: float, path: Path
) -> None:
    """Zero-shot accuracy by language, a bar for each model.

    Args:
        by_model: Model -> language -> top-1 accuracy as a fraction.
        names: Model -> its name in the legend.
        chance: Accuracy of guessing, drawn as a line.
        path: PNG file to write.
    """
    languages = list(next(iter(by_model.values())))
    width = 0.8 / len(by_model)
    figure, axis = plt.subplots(figsize=(9, 3))
    for i, (model, scores) in enumerate(by_model.items()):
        positions = [x + (i - (len(by_model) - 1) / 2) * width for x in range(len(languages))]
        axis.bar(
            positions,
            [100 * scores[language] for language in languages],
            width,
            label=names[model],
            color=COLORS[model],
        )
    axis.axhline(100 * chance, color="black", linewidth=0.8, linestyle=":", label="chance")
    axis.set_xticks(range(len(languages)), languages)
    axis.set_ylabel("zero-shot top-1 (%)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=len(by_model) + 1, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(figure, path)


def plot_retrieval(
    rows: Sequence[tuple[str, Sequence[tuple[Image.Image, bool]], Sequence[tuple[Image.Image, bool]]]], path: Path
) -> None:
    """Caption by caption, the first images that CLIP and ProCLIP find; the right one is framed in green.

    Args:
        rows: (caption, CLIP's images, ProCLIP's images); an image comes with whether it is the caption's own.
        path: PNG file to write.
    """
    shown = len(rows[0][1])
    figure, axes = plt.subplots(len(rows), 2 * shown + 1, figsize=(1.05 * (2 * shown + 0.4), 1.45 * len(rows)), squeeze=False,
                                width_ratios=[1] * shown + [0.25] + [1] * shown)  # fmt: skip
    for row, (caption, first, second) in zip(axes, rows, strict=True):
        row[shown].axis("off")
        for axis, (image, right) in zip([*row[:shown], *row[shown + 1 :]], [*first, *second], strict=True):
            axis.imshow(image)
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_color(COLORS["proclip"] if right else "#cccccc")
                spine.set_linewidth(4 if right else 0.8)
        row[0].set_title(caption, loc="left", fontsize=9)
    figure.subplots_adjust(wspace=0.12, hspace=0.5)
    for column, title in ((0, "CLIP finds"), (shown + 1, "ProCLIP finds")):
        corner = axes[0][column].get_position()
        figure.text(corner.x0, corner.y1 + 0.05, title, fontsize=11, fontweight="bold")
    _save(figure, path)
