"""The report's plots as SVG, each in a light and a dark version.

Every function takes fractions and draws percent. Error bars are the intervals that the report's tables state. A plot has no title of its own: the report says
above it what it shows, in text that can be read aloud.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of a page: text and axes, grid, the margin's band, the baseline, and the models in their order."""

    text: str
    grid: str
    band: str
    baseline: str
    models: tuple[str, ...]


# Okabe and Ito's colours, which people with any colour vision tell apart; on dark ground lightened to the same contrast.
LIGHT = Theme("#1f2328", "#d8dee4", "#eef1f4", "#7d858e", ("#00755a", "#c25700", "#1668a8", "#a03b78", "#8a6d00"))
DARK = Theme("#e6edf3", "#343b44", "#222932", "#8d96a0", ("#3fc79f", "#f0903c", "#5aaeea", "#dd8abb", "#d9b935"))
THEMES = {"light": LIGHT, "dark": DARK}
MARKERS = "osD^v"

Point = Mapping[str, float]  # {"value": ..., "low": ..., "high": ...}


def changes(
    rows: Sequence[tuple[str, Sequence[Point | None], bool]], models: Sequence[str], margin: float, theme: Theme
) -> bytes:
    """Differences against the baseline, in points: a line for each score, a dot with its interval for each model.

    `rows` have the label of the score; model by model its difference, `None` where it was not compared; and whether it heads those below it. `margin`,
    the largest loss that counts as kept, is drawn as a band.
    """
    figure, axes = _figure(7.6, 0.55 + len(rows) * (0.2 + 0.11 * len(models)), theme)
    axes.axvspan(-100 * margin, 100 * margin, color=theme.band, zorder=0)
    axes.axvline(0, color=theme.text, linewidth=1, zorder=1)
    drawn: dict[int, Any] = {}
    for place, (_, points, _) in enumerate(rows):
        for number, point in enumerate(points):
            if point is not None:
                offset = (number - (len(models) - 1) / 2) * 0.26
                drawn[number] = _dot(axes, place + offset, point, number, theme)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [_literal(label) for label, _, _ in rows])
    for tick, (_, _, heads) in zip(axes.get_yticklabels(), rows, strict=True):
        if heads:
            tick.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=theme.grid, linewidth=0.7)
    axes.set_xlabel("change against the baseline (percentage points)", color=theme.text)
    axes.spines["left"].set_visible(False)
    if len(models) > 1:
        _legend(axes, [drawn[n] for n in drawn], [_literal(models[n]) for n in drawn], theme)
    return _svg(figure)


def bars(
    rows: Sequence[tuple[str, Sequence[Point | None]]],
    models: Sequence[str],
    theme: Theme,
    chance: float | None = None,
    ylabel: str = "score (%)",
) -> bytes:
    """Scores in percent with their intervals: a group of bars for each row, the baseline's first and grey.

    `rows` have a label and, model by model, the score; the first model is the baseline. `chance`, the score of guessing, is drawn as a line.
    """
    inches = max(4.6, min(10.5, 1.2 + 0.27 * len(rows) * len(models)))
    # A letter is about 0.085 inches wide.
    rotate = max(len(label) for label, _ in rows) * 0.085 > 0.9 * inches / len(rows)
    figure, axes = _figure(inches, 3.4, theme)
    width = 0.82 / len(models)
    for number, model in enumerate(models):
        color = theme.baseline if number == 0 else theme.models[(number - 1) % len(theme.models)]
        places, heights, below, above = [], [], [], []
        for place, (_, points) in enumerate(rows):
            point = points[number]
            if point is not None:
                places.append(place + (number - (len(models) - 1) / 2) * width)
                heights.append(100 * point["value"])
                below.append(100 * max(0.0, point["value"] - point["low"]))
                above.append(100 * max(0.0, point["high"] - point["value"]))
        axes.bar(places, heights, 0.92 * width, color=color, label=_literal(model), zorder=2)
        axes.errorbar(
            places, heights, [below, above], fmt="none", ecolor=theme.text, elinewidth=0.9, capsize=1.6, capthick=0.9
        )
    if chance is not None:
        axes.axhline(100 * chance, color=theme.text, linewidth=0.9, linestyle=(0, (2, 2)), label="chance", zorder=3)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylim(0, None)
    axes.set_ylim(0, min(max(axes.get_ylim()[1], 1), 104))
    axes.set_xticks(range(len(rows)), [_literal(label) for label, _ in rows])
    if rotate:
        for tick in axes.get_xticklabels():
            tick.set(rotation=35, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_ylabel(ylabel, color=theme.text)
    _legend(axes, *axes.get_legend_handles_labels(), theme)
    return _svg(figure)


def lines(series: Mapping[str, Sequence[tuple[str, float]]], theme: Theme, ylabel: str) -> bytes:
    """A value of 0 to 1 by layer, a line for each model. `series`: model -> (layer, value), first layer first."""
    figure, axes = _figure(7.6, 3.0, theme)
    lowest = 0.0
    for number, (model, points) in enumerate(series.items()):
        axes.plot(
            [value for _, value in points],
            color=theme.models[number % len(theme.models)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            linewidth=1.6,
            label=_literal(model),
        )
        lowest = min(lowest, *(value for _, value in points))
    labels = [layer for layer, _ in max(series.values(), key=len)]
    step = -(-len(labels) // 14)
    shown = [i for i in range(len(labels)) if i in (0, len(labels) - 1) or (i % step == 0 and i < len(labels) - step)]
    axes.set_xticks(shown, [_literal(labels[i]) for i in shown])
    axes.set_ylim(lowest - 0.03, 1.03)
    axes.grid(axis="y", color=theme.grid, linewidth=0.7)
    axes.set_xlabel("layer of the image encoder", color=theme.text)
    axes.set_ylabel(ylabel, color=theme.text)
    if len(series) > 1:
        _legend(axes, *axes.get_legend_handles_labels(), theme)
    return _svg(figure)


def _figure(width: float, height: float, theme: Theme) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), facecolor="none")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(theme.text)
    axes.tick_params(colors=theme.text, labelsize=9)
    return figure, axes


def _literal(name: str) -> str:
    """A name as matplotlib shows it letter by letter: without formulas between dollars, and in the legend although it begins with "_"."""
    text = "".join(c if c.isprintable() else " " for c in name)
    text = text if len(text) <= 60 else f"{text[:59]}…"
    return (f" {text}" if text.startswith("_") else text).replace("$", r"\$")


def _dot(axes: Axes, y: float, point: Point, number: int, theme: Theme) -> Any:
    return axes.errorbar(
        100 * point["value"],
        y,
        xerr=[[100 * (point["value"] - point["low"])], [100 * (point["high"] - point["value"])]],
        fmt=MARKERS[number % len(MARKERS)],
        color=theme.models[number % len(theme.models)],
        markersize=4.5,
        elinewidth=1.5,
        capsize=2.5,
        zorder=3,
    )


def _legend(axes: Axes, handles: Sequence[Any], labels: Sequence[str], theme: Theme) -> None:
    axes.legend(
        handles,
        labels,
        frameon=False,
        fontsize=9,
        ncols=min(len(labels), 4),
        labelcolor=theme.text,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.2,
        handlelength=1.4,
        columnspacing=1.4,
    )


def _svg(figure: Figure) -> bytes:
    """The figure as SVG. The same figure gives the same bytes."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "proclip", "svg.fonttype": "path"}):
        figure.savefig(
            file, format="svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None, "Creator": None}
        )
    return file.getvalue()
