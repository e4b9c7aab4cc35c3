"""What the report says, as one JSON object: the verdict, every number that is shown, and what was not measured."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .bootstrap import Interval, score_interval
from .pairing import ModelResults, pair
from .verdict import CONFIDENCE, MARGIN, RESAMPLES, Change, Verdict, area_of, compare, describe


REPORT_VERSION = 1
CONFUSIONS_SHOWN = 8

# What a whole answer would need. A report says which of these it lacks.
COVERAGE = {
    "classification": "zero-shot classification",
    "robustness": "robustness (ImageNet-V2, A, O, R, Sketch)",
    "retrieval": "retrieval by short captions",
    "long_retrieval": "retrieval by long captions",
    "multilingual": "languages other than English",
    "fine_grained": "fine-grained understanding (MMVP-VLM, SugarCrepe)",
    "linear_probe": "linear probe: what the image encoder holds, whatever the text side makes of it",
    "cka": "CKA: how far the image encoder moved, layer by layer",
}


def build_report(
    models: Sequence[ModelResults],
    baseline: ModelResults | None,
    *,
    margin: float = MARGIN,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int | None = None,
) -> dict[str, Any]:
    """The report of one or several models against one baseline.

    Args:
        models: results, each of another model.
        baseline: results of the model that they came from; `None` gives scores without a verdict.
        margin, confidence, resamples: see `trainers.evaluation.report.verdict.compare`.
        seed: seed of the bootstrap; `None` takes that of the first results.

    Returns:
        A JSON object. Scores and differences are fractions, each with "value", "low" and "high".

    Raises:
        ValueError: two models of one name (a baseline's gets an addition), or nothing that a model and the baseline have in common.
    """
    names = [results.name for results in (*([baseline] if baseline else []), *models)]
    if baseline is not None and names[0] in names[1:]:  # two checkpoints in folders of one name
        baseline = dataclasses.replace(baseline, name=f"{baseline.name} (baseline)")
        names[0] = baseline.name
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"two of the models are called {twice[0]!r}: evaluate them from folders with different names")
    seed = int(models[0].content["seed"]) if seed is None else seed
    report: dict[str, Any] = {
        "report_version": REPORT_VERSION,
        "baseline": baseline.name if baseline else None,
        "models": [],
        "scores": _scores([*([baseline] if baseline else []), *models], confidence, resamples, seed),
        "confusions": [entry for results in models for entry in _confusions(results)],
        "cka": {
            results.name: task["layers"]
            for results in models
            for task in results.tasks.values()
            if task["kind"] == "cka"
        },
        "not_measured": _not_measured(models[0]),
        "bootstrap": {"margin": margin, "confidence": confidence, "resamples": resamples, "seed": seed},
        "runs": [_run(results) for results in (*([baseline] if baseline else []), *models)],
    }
    for results in models:
        entry: dict[str, Any] = {"name": results.name, "verdict": None, "left_out": {}}
        if baseline is not None:
            pairing = pair(results, baseline)
            if pairing.tasks or pairing.left_out:
                entry["verdict"] = _verdict(compare(pairing.tasks, margin, confidence, resamples, seed), margin)
            entry["left_out"] = pairing.left_out
        report["models"].append(entry)
    # A run of CKA alone compares, but decides nothing.
    report["compared"] = all(entry["verdict"] for entry in report["models"])
    return report


def _verdict(verdict: Verdict, margin: float) -> dict[str, Any]:
    return {
        "answer": verdict.answer,
        "headline": verdict.headline,
        "sentences": verdict.sentences,
        "averages": [_change(change, margin) for change in verdict.averages],
        "tasks": [_change(change, margin) for change in verdict.tasks],
    }


def _change(change: Change, margin: float) -> dict[str, Any]:
    return {**asdict(change), "area": area_of(change.group), "words": describe(change, margin)}


def _scores(runs: Sequence[ModelResults], confidence: float, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Every score with an interval, in the order of the tasks: one row a task and metric, one value a model (`None`: not scored)."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for number, results in enumerate(runs):
        for name, task in results.tasks.items():
            if task["kind"] == "cka":
                continue
            outcomes = results.outcomes(name)
            found = {metric: score_interval(some, confidence, resamples, seed) for metric, some in outcomes.items()}
            for metric, value in (
                found or {task["metric"]: Interval(task["value"], task["value"], task["value"])}
            ).items():
                row = rows.setdefault(
                    (name, metric),
                    {
                        "name": name,
                        "title": task.get("title", name),
                        "metric": metric,
                        "group": task["group"],
                        "area": area_of(task["group"]),
                        "num_items": task["dataset"]["num_items"],
                        "num_classes": task.get("protocol", {}).get("num_classes"),
                        "values": [None] * len(runs),
                    },
                )
                row["values"][number] = asdict(value)
    return list(rows.values())


def _confusions(results: ModelResults) -> list[dict[str, Any]]:
    """Which class is taken for which, the most frequent first, in the task of zero-shot classification with the most mistakes."""
    best: dict[str, Any] | None = None
    for name, task in results.tasks.items():
        classes = task.get("protocol", {}).get("classes")
        items = results.items(name)
        if task["group"] not in ("classification", "robustness") or classes is None or "prediction" not in items:
            continue
        wrong = items["correct"] == 0
        pairs = Counter(zip(items["label"][wrong].tolist(), items["prediction"][wrong].tolist(), strict=True))
        of_class = Counter(items["label"].tolist())
        rows = [
            {"right": classes[label], "said": classes[said], "count": count, "of": of_class[label]}
            for (label, said), count in sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
        ]
        if best is None or int(wrong.sum()) > best["num_wrong"]:
            best = {
                "model": results.name,
                "task": name,
                "title": task.get("title", name),
                "num_wrong": int(wrong.sum()),
                "num_items": len(wrong),
                "rows": rows[:CONFUSIONS_SHOWN],
            }
    return [] if best is None else [best]


def _not_measured(results: ModelResults) -> list[str]:
    groups = {task["group"] for task in results.tasks.values()} | {task["kind"] for task in results.tasks.values()}
    return [words for group, words in COVERAGE.items() if group not in groups]


def _run(results: ModelResults) -> dict[str, Any]:
    content = results.content
    return {
        "model": {**content["model"], "name": results.name},
        "protocol": content.get("protocol", {}),
        "versions": content.get("versions", {}),
        "seed": content["seed"],
        "partial": content.get("partial"),
        "tasks": [
            {
                **{key: task.get(key) for key in ("name", "title", "kind", "dataset", "metric", "notes", "seconds")},
                # Class names are long, and in results.json.
                "protocol": {key: value for key, value in task.get("protocol", {}).items() if key != "classes"},
            }
            for task in results.tasks.values()
        ],
    }
