"""Evaluation results as a card shows them: rows of a table and the entries of `model-index`."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult


RESULTS_FILE = "results.json"
# What the papers measure (method, "benchmarks of the papers"); a card says which of them its results leave out.
GROUPS = {
    "classification": "zero-shot classification",
    "robustness": "zero-shot classification on shifted pictures (robustness)",
    "retrieval": "image-text retrieval",
    "long_retrieval": "retrieval by long texts",
    "multilingual": "languages other than English",
    "fine_grained": "fine-grained distinctions",
}
# Kind of a task -> the Hub's name of it. The Hub knows no task of image-text retrieval; the Hub does not refuse others' names.
_TASKS = {
    "zero_shot": "zero-shot-image-classification",
    "retrieval": "image-text-retrieval",
    "caption_retrieval": "text-retrieval",
    "fine_grained": "image-text-matching",
    "linear_probe": "image-classification",
    "cka": "representation-similarity",
}
_QUICKSTART = {
    "zero_shot_seen": ("zero_shot", "classification", "concepts with pictures in the alignment", "top1"),
    "zero_shot_unseen": ("zero_shot", "classification", "concepts without pictures in the alignment", "top1"),
    "i2t_r@1": ("retrieval", "long_retrieval", "pictures and detailed captions", "i2t_r@1"),
    "t2i_r@1": ("retrieval", "long_retrieval", "pictures and detailed captions", "t2i_r@1"),
}


@dataclass(frozen=True)
class Measurement:
    """
    One measured number.

    Attributes:
        task: Name of the task.
        kind, group: What was done and what for, as `proclip evaluate` names them.
        dataset: Name of the data set.
        split, revision, num_items: Of the data set, where they are recorded.
        metric: Name of the metric.
        value: As measured: a fraction for shares.
        primary: Whether it is the number that stands for the task.
        limit: Rows that were drawn of the data set, if not all were read; the number is then no benchmark's.
    """

    task: str
    kind: str
    group: str
    dataset: str
    metric: str
    value: float
    split: str | None = None
    revision: str | None = None
    num_items: int | None = None
    primary: bool = True
    limit: int | None = None


def read_measurements(path: str | Path) -> list[Measurement]:
    """
    The numbers of one evaluation of one model.

    Args:
        path: A `results.json` that `proclip evaluate` or `proclip quickstart` wrote, or the folder that it lies in.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another format or holds a number that is not finite; names the file and the entry.
    """
    file = _results_file(path)
    content = _load(file)
    if isinstance(content, dict) and "tasks" in content:
        limit = (content.get("partial") or {}).get("limit")
        results = [result for task in content["tasks"] for result in _read_task(task, limit, file)]
    elif isinstance(content, dict) and "rows" in content:
        results = _read_quickstart(content, file)
    else:
        raise ValueError(
            f'{file} is no result of `proclip evaluate` or `proclip quickstart`: it has neither "tasks" nor "rows"'
        )
    for result in results:
        if not math.isfinite(result.value):
            raise ValueError(
                f"{file}: {result.metric!r} of {result.task!r} is {result.value}, which is no measurement"
            )
    return results


def evaluated_weights(path: str | Path) -> str | None:
    """Hash of the weights that were evaluated, the LLM's aside (`own_weights_sha256`), where the results name it."""
    model = _load(_results_file(path)).get("model")
    return model.get("own_weights_sha256") if isinstance(model, dict) else None


def model_index(results: Iterable[Measurement]) -> list[EvalResult]:
    """
    The results as the Hub's `model-index` holds them, without those of drawn rows, which are no benchmark's.

    Entries that agree in task, type, configuration, split and revision of the data set are merged by the Hub's library, which keeps one
    name of them; so the task's name is the configuration too.
    """
    return [
        EvalResult(
            task_type=_TASKS.get(result.kind, result.kind),
            dataset_type=_identifier(result.dataset),
            dataset_name=result.task,
            dataset_config=result.task,
            dataset_split=result.split,
            dataset_revision=result.revision,
            metric_type=_metric_type(result.metric),
            metric_name=result.metric,
            metric_value=result.value,
        )
        for result in results
        if result.limit is None
    ]


def not_measured(results: Iterable[Measurement]) -> list[str]:
    """Which of the papers' groups of benchmarks have no result, in words."""
    measured = {result.group for result in results}
    return [words for group, words in GROUPS.items() if group not in measured]


def shown_dataset(source: str) -> str:
    """A Hub name as it is; of a file or folder the last part, as the rest is of no use to others."""
    return source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else Path(source).name or source


def _identifier(name: str) -> str:
    return re.sub(r"[^\w./@-]+", "-", shown_dataset(name)).strip("-").lower()


def _metric_type(metric: str) -> str:
    """The Hub's name of a metric: https://hf.co/metrics knows accuracy and recall, whatever they are counted over."""
    if re.fullmatch(r"top\d+|(mean_per_class_)?accuracy", metric):
        return "accuracy"
    return "recall" if re.fullmatch(r"\w+_r@\d+", metric) else _identifier(metric)


def _results_file(path: str | Path) -> Path:
    file = Path(path) / RESULTS_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: name the folder that `proclip evaluate` wrote its results to")
    return file


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error


def _read_task(task: dict[str, Any], limit: int | None, file: Path) -> list[Measurement]:
    try:
        dataset = task["dataset"]
        metrics = {task["metric"]: task["value"], **task["metrics"]}
        return [
            Measurement(
                task=task.get("title") or task["name"],
                kind=task["kind"],
                group=task["group"],
                dataset=dataset["source"],
                split=dataset.get("split"),
                revision=dataset.get("revision"),
                num_items=dataset.get("num_items"),
                metric=metric,
                value=float(value),
                primary=metric == task["metric"],
                limit=limit,
            )
            for metric, value in metrics.items()
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: the task {task.get('name')!r} has no usable entry {error}") from error


def _read_quickstart(content: dict[str, Any], file: Path) -> list[Measurement]:
    rows = [row for row in content["rows"] if row.get("model") == "proclip"]
    if not rows:
        raise ValueError(f'{file} has no row "proclip"')
    results = [
        Measurement(f"OpenMoji, {what}", kind, group, "OpenMoji", metric, rows[0][key])
        for key, (kind, group, what, metric) in _QUICKSTART.items()
    ]
    by_language = rows[0]["zero_shot_by_language"]
    results += [
        Measurement(
            f"OpenMoji, concepts named in {language!r}",
            "zero_shot",
            "classification" if language == "en" else "multilingual",
            "OpenMoji",
            "top1",
            value,
        )
        for language, value in by_language.items()
    ]
    return results
