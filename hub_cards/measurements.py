"""Evaluation results as a card shows them: rows of a table and the entries of `model-index`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from pydantic import FiniteFloat

from modeling_proclip.conversion.json_files import read_json

from .checkpoint_facts import checked
from .scrubbing import scrub


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
    """One measured number, a fraction for shares.

    Attributes:
        kind, group: Kind of the task and of the benchmark, in the words of `proclip evaluate`.
        primary: Whether it is the number that stands for the task.
        limit: Rows that were drawn of the data set, if not all were read; the number is then no benchmark's.
        precision: What it was computed in, in words, where that is recorded: another dtype gives another number.
        changed: Whether the embeddings were cut or quantised before they were scored; the number is then not the model's own.
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
    precision: str | None = None
    changed: bool = False


def read_measurements(path: str | Path) -> list[Measurement]:
    """The numbers of one evaluation of one model.

    Args:
        path: A `results.json` that `proclip evaluate` or `proclip quickstart` wrote, or the folder that it lies in.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another format or holds a number that is not finite; names the file and the entry.
    """
    file = _results_file(path)
    content = read_json(file)
    if "tasks" in content:
        evaluation = checked(_Evaluation, content, f"{file} is not a result that a card can show")
        limit = evaluation.partial.limit if evaluation.partial else None
        protocol = evaluation.protocol or {}
        return [measurement for task in evaluation.tasks for measurement in _task_measurements(task, limit, protocol)]
    if "rows" in content:
        return _quickstart_measurements(content, file)
    raise ValueError(
        f'{file} is not a result of `proclip evaluate` or `proclip quickstart`: it has neither "tasks" nor "rows"'
    )


def precision(protocol: Mapping[str, Any]) -> str | None:
    """What numbers were computed in, in words, of the "dtype" and "device" of a protocol; None where it names no dtype."""
    dtype = protocol.get("dtype")
    if not isinstance(dtype, Mapping):
        return None
    computed = f"images in {dtype.get('image')} and texts in {dtype.get('text')}, on {protocol.get('device')}"
    if changes_embeddings(protocol):
        cut = f"; embeddings cut to {protocol['truncate_dim']} dimensions" if protocol.get("truncate_dim") else ""
        computed += f"{cut}; image embeddings stored in {protocol.get('precision')}"
    return scrub(computed)


def changes_embeddings(protocol: Mapping[str, Any]) -> bool:
    """Whether the embeddings were cut or quantised before they were scored."""
    return protocol.get("truncate_dim") is not None or protocol.get("precision", "float32") != "float32"


def results_for_others(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a `results.json` in which tasks on a person's own images name no folder; earlier releases wrote it as their title."""
    tasks = [
        {**task, "title": task["name"], "dataset": {**task["dataset"], "source": Path(task["dataset"]["source"]).name}}
        if task["group"] == "own"
        else task
        for task in content.get("tasks", [])
    ]
    return {**content, "tasks": tasks} if tasks else content


def evaluated_weights(path: str | Path) -> str | None:
    """Hash of the weights that were evaluated, the LLM's aside (`own_weights_sha256`), where the results name it."""
    model = read_json(_results_file(path)).get("model")
    return model.get("own_weights_sha256") if isinstance(model, dict) else None


def model_index(results: Iterable[Measurement]) -> list[EvalResult]:
    """The results as the Hub's `model-index` holds them, without those of drawn rows, which are no benchmark's, and of cut or quantised
    embeddings, which are not the model's own.

    The Hub's library merges entries that agree in task, type, configuration, split and revision of the data set and keeps one name of them; so
    the task's name is the configuration too.
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
        if result.limit is None and not result.changed
    ]


def not_measured(results: Iterable[Measurement]) -> list[str]:
    """Which of the papers' groups of benchmarks have no result, in words."""
    measured = {result.group for result in results}
    return [words for group, words in GROUPS.items() if group not in measured]


def shown_source(data: Mapping[str, Any]) -> str:
    """Where data came from, as a card shows it: its name on the Hub, an address without a password, or the last part of a path. `data` is a record of
    training or evaluation; "revision" or "on_hub" mark data of the Hub, and "read_from" a local copy of what has a name.
    """
    source = data["source"]
    shown = scrub(source)
    named = data.get("revision") or data.get("on_hub") or data.get("read_from") == "local copy" or "://" in shown
    return shown if named or not shown else Path(shown).name


def _identifier(name: str) -> str:
    return re.sub(r"[^\w./@-]+", "-", name).strip("-").lower()


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


@dataclass
class _Data:
    source: str
    split: str | None = None
    revision: str | None = None
    num_items: int | None = None
    read_from: str | None = None


@dataclass
class _Task:
    name: str
    kind: str
    group: str
    dataset: _Data
    metric: str
    value: FiniteFloat
    metrics: dict[str, FiniteFloat]
    title: str = ""


@dataclass
class _Partial:
    limit: int | None = None


@dataclass
class _Evaluation:
    tasks: list[_Task]
    partial: _Partial | None = None
    protocol: dict[str, Any] | None = None


@dataclass
class _Quickstart:
    rows: list[dict[str, Any]]
    protocol: dict[str, Any] | None = None


def _task_measurements(task: _Task, limit: int | None, protocol: Mapping[str, Any]) -> list[Measurement]:
    data, own = task.dataset, task.group == "own"  # of a person's own images the title is their folder
    source = Path(data.source).name if own else shown_source(vars(data))
    return [
        Measurement(
            task=scrub(task.name if own else task.title or task.name),
            kind=task.kind,
            group=task.group,
            dataset=source,
            split=data.split,
            revision=data.revision,
            num_items=data.num_items,
            metric=metric,
            value=value,
            primary=metric == task.metric,
            limit=limit,
            precision=precision(protocol),
            changed=changes_embeddings(protocol),
        )
        for metric, value in {task.metric: task.value, **task.metrics}.items()
    ]


def _quickstart_measurements(content: dict[str, Any], file: Path) -> list[Measurement]:
    unfit = f"{file} is not a result that a card can show"
    results = checked(_Quickstart, content, unfit)
    row = next((row for row in results.rows if row.get("model") == "proclip"), None)
    if row is None:
        raise ValueError(f'{file} has no row "proclip"')
    numbers = checked(dict[str, FiniteFloat], {key: row.get(key) for key in _QUICKSTART}, unfit)
    by_language = checked(dict[str, FiniteFloat], row.get("zero_shot_by_language"), unfit)
    computed_in = precision(results.protocol or {})
    measurements = [
        Measurement(f"OpenMoji, {what}", kind, group, "OpenMoji", metric, numbers[key], precision=computed_in)
        for key, (kind, group, what, metric) in _QUICKSTART.items()
    ]
    measurements += [
        Measurement(
            f"OpenMoji, concepts named in {language!r}",
            "zero_shot",
            "classification" if language == "en" else "multilingual",
            "OpenMoji",
            "top1",
            value,
            precision=computed_in,
        )
        for language, value in by_language.items()
    ]
    return measurements
