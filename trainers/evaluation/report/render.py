"""The report as one HTML file that needs nothing else: plots and images are inside it."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.display.html import html_environment

from . import plots
from .verdict import ceil_points, floor_points


METRIC_NAMES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_per_class": "mean per class",
    "accuracy": "accuracy",
    "i2t_r@1": "image → text R@1",
    "t2i_r@1": "text → image R@1",
    "first_to_second_r@1": "first → second caption R@1",
    "second_to_first_r@1": "second → first caption R@1",
    "text_score": "text score",
    "image_score": "image score",
    "group_score": "group score",
    "average": "average",
}
SHORT_METRICS = {"i2t_r@1": " I→T", "t2i_r@1": " T→I", "first_to_second_r@1": " 1→2", "second_to_first_r@1": " 2→1"}
# Languages beyond this many have a plot of their own, and only their average beside the other scores.
_LANGUAGES_APART = 4


def render(report: dict[str, Any], examples: Sequence[dict[str, Any]]) -> str:
    """The report as HTML. `report` is as `build_report` makes it, `examples` of retrieval as `retrieval_examples` does; there may be none."""
    environment = html_environment(Path(__file__).parent / "templates")
    environment.filters |= {
        "percent": lambda fraction: f"{100 * fraction:.1f}",
        "points": lambda fraction: _signed(100 * fraction),
        # Ends of intervals are rounded outwards, as in the verdict's words.
        "low_points": lambda fraction: _signed(floor_points(fraction)),
        "high_points": lambda fraction: _signed(ceil_points(fraction)),
        "count": lambda number: f"{number:,}",
        "metric": lambda name: METRIC_NAMES.get(name, name),
    }
    names = [*([report["baseline"]] if report["baseline"] else []), *(model["name"] for model in report["models"])]
    page = environment.get_template("report.html.jinja")
    return page.render(report=report, names=names, examples=examples, charts=charts(report, names))


def charts(report: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The plots: name -> {"light", "dark": data URIs, "alt": text, "title": what is seen}; languages are a list of them."""
    found: dict[str, Any] = {"changes": None, "scores": None, "languages": [], "cka": None}
    verdicts = [model["verdict"] for model in report["models"] if model["verdict"]]
    tuned = [model["name"] for model in report["models"]]
    if report["compared"]:
        rows = _change_rows(verdicts)
        found["changes"] = {
            **_both(plots.changes, rows, tuned, report["bootstrap"]["margin"]),
            "title": _summary(report["models"]),
            "alt": f"Difference of each score from {report['baseline']}, with its interval. The numbers are in the table of all scores.",
        }
    languages = [row for row in report["scores"] if row["group"] == "multilingual"]
    apart = len(languages) > _LANGUAGES_APART
    shown = [row for row in report["scores"] if not (apart and row in languages)]
    if shown:
        labelled = [(_label(row), row["values"]) for row in shown]
        found["scores"] = {
            **_both(_bars(report), labelled, names),
            "title": "Every score, with its interval" + (", except by language" if apart else ""),
            "alt": "Bars of every score of each model. The numbers are in the table below.",
        }
    for metric in dict.fromkeys(row["metric"] for row in languages) if apart else ():
        of_metric = [row for row in languages if row["metric"] == metric]
        classes = {row["num_classes"] for row in of_metric}
        chance = 1 / next(iter(classes)) if len(classes) == 1 and None not in classes else None
        labelled = [(label, row["values"]) for label, row in zip(_language_codes(of_metric), of_metric, strict=True)]
        found["languages"].append(
            {
                **_both(
                    _bars(report), labelled, names, chance=chance, ylabel=f"{METRIC_NAMES.get(metric, metric)} (%)"
                ),
                "title": f"{len(of_metric)} languages: {METRIC_NAMES.get(metric, metric)}"
                + (f", chance {100 * chance:.1f} %" if chance else ""),
                "alt": f"Bars of the {METRIC_NAMES.get(metric, metric)} of each model by language. The numbers are in the table of all scores.",
            }
        )
    if report["cka"]:
        series = {
            model: [(row["layer"], row["cka_debiased"]) for row in layers] for model, layers in report["cka"].items()
        }
        last = ", ".join(f"{model} {points[-1][1]:.2f}" for model, points in series.items())
        found["cka"] = {
            **_both(plots.lines, series, ylabel="CKA, debiased (1: unchanged)"),
            "title": f"How much of {report['baseline'] or 'the original'}’s image encoder is left at each layer; in the embedding: {last}",
            "alt": f"CKA between the tuned and the original image encoder by layer. In the embedding: {last}.",
        }
    return found


def _change_rows(verdicts: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, float] | None], bool]]:
    """Areas with their averages, each followed by its scores; a model that lacks one has `None` there."""

    def by_name(entries: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
        return {(entry["name"], entry["metric"]): entry for entry in entries}

    averages = [by_name(verdict["averages"]) for verdict in verdicts]
    tasks = [by_name(verdict["tasks"]) for verdict in verdicts]
    rows: list[tuple[str, list[dict[str, float] | None], bool]] = []
    for area in dict.fromkeys(key for some in averages for key in some):
        of_area = list(dict.fromkeys(key for some in tasks for key, entry in some.items() if entry["area"] == area[0]))
        whole = [some[area]["difference"] if area in some else None for some in averages]
        alone = len(of_area) == 1
        title = area[0][0].upper() + area[0][1:]
        rows.append((title if alone else f"{title}: average of {len(of_area)}", [] if alone else whole, True))
        if of_area and len(of_area) > _LANGUAGES_APART and tasks[0].get(of_area[0], {}).get("group") == "multilingual":
            continue
        for key in of_area:
            label = f"{key[0]}{SHORT_METRICS.get(key[1], '')}"
            rows.append((label, [some[key]["difference"] if key in some else None for some in tasks], False))
    return rows


def _bars(report: dict[str, Any]):
    """`plots.bars` whose first model is grey only if it is a baseline."""
    if report["baseline"]:
        return plots.bars
    return lambda rows, names, theme, **keywords: plots.bars(
        [(label, [None, *values]) for label, values in rows], ["", *names], theme, **keywords
    )


def _label(row: dict[str, Any]) -> str:
    return f"{row['name']}{SHORT_METRICS.get(row['metric'], '')}"


def _language_codes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the names differ in: "es" of "openmoji-language-es"."""
    codes = [row["name"].rsplit("-", 1)[-1] for row in rows]
    return codes if len(set(codes)) == len(codes) else [row["name"] for row in rows]


def _summary(models: Sequence[dict[str, Any]]) -> str:
    """How many scores each model gained, kept and lost."""
    parts = []
    for model in models:
        decisions = [task["decision"] for task in model["verdict"]["tasks"]]
        counts = [(decisions.count(kind), kind) for kind in ("lost", "kept", "gained", "undecided")]
        words = [f"{count} {kind}" for count, kind in counts if count]
        parts.append(f"{model['name']}: of {len(decisions)} scores {', '.join(words)}")
    return "; ".join(parts)


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")


def _both(draw, *arguments: Any, **keywords: Any) -> dict[str, str]:
    return {name: svg_uri(draw(*arguments, theme=theme, **keywords)) for name, theme in plots.THEMES.items()}


def svg_uri(svg: bytes) -> str:
    """A data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
