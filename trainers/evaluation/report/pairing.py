"""Reads the results folders that `proclip evaluate` writes, and pairs two of them for the verdict."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from trainers.evaluation.results import read_results

from .bootstrap import (
    Outcomes,
    accuracy_outcomes,
    image_to_text_outcomes,
    mean_per_class_outcomes,
    text_to_image_outcomes,
)
from .verdict import Task


@dataclass(frozen=True)
class ModelResults:
    """One model's results: the folder that they are in, what its results.json holds, and what the report calls the model."""

    folder: Path
    content: dict[str, Any]
    name: str

    @classmethod
    def read(cls, folder: Path) -> "ModelResults":
        """Read `folder/results.json`. FileNotFoundError or ValueError as [`read_results`]."""
        content = read_results(folder)
        return cls(folder, content, str(content["model"]["name"]))

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """The tasks by name, in their order."""
        return {task["name"]: task for task in self.content["tasks"]}

    def items(self, task: str) -> dict[str, np.ndarray]:
        """The outcomes of each item of `task`; empty if none were kept. ValueError names a file that is missing or broken."""
        file = self.tasks[task].get("items_file")
        if file is None:
            return {}
        path = self.folder / file
        try:
            return load_file(path)
        except Exception as error:  # safetensors has an error class of its own, and the file may be missing
            raise ValueError(f"{path} cannot be read ({error}): evaluate {task!r} again") from error

    def examples(self) -> list[dict[str, Any]]:
        """The retrieval examples of the tasks; empty if none were kept."""
        path = self.folder / "examples.json"
        if not path.is_file():
            return []
        try:
            examples = json.loads(path.read_text(encoding="utf-8"))
            return [example for example in examples if example["task"] in self.tasks]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}): evaluate again") from error

    def outcomes(self, task: str) -> dict[str, Outcomes]:
        """Metric -> outcomes of the items, for the metrics of `task` that the report shows; empty for a task without items."""
        entry, items = self.tasks[task], self.items(task)
        if not items:
            return {}
        try:
            if "i2t_rank" in items:
                ranks, index = items["t2i_rank"], items["text_to_image"]
                caption_names = ("first_to_second_r@1", "second_to_first_r@1")
                first, second = caption_names if entry["kind"] == "caption_retrieval" else ("i2t_r@1", "t2i_r@1")
                return {
                    first: image_to_text_outcomes(items["i2t_rank"], 1),
                    second: text_to_image_outcomes(ranks, index, 1),
                }
            if entry["metric"] == "mean_per_class":
                return {"mean_per_class": mean_per_class_outcomes(items["correct"], items["label"])}
            return {entry["metric"]: accuracy_outcomes(items["correct"])}
        except KeyError as error:
            raise ValueError(f"{self.folder / entry['items_file']} has no {error}: evaluate {task!r} again") from error


@dataclass(frozen=True)
class Pairing:
    """What two results have in common: the scores of both, ready for the verdict, and task -> why it is not compared."""

    tasks: list[Task]
    left_out: dict[str, str]


def pair(model: ModelResults, baseline: ModelResults) -> Pairing:
    """Pairs the tasks that both were scored on, with the same data and the same items. ValueError if a file of either is broken."""
    tasks: list[Task] = []
    left_out: dict[str, str] = {}
    for name, entry in model.tasks.items():
        other = baseline.tasks.get(name)
        if entry["kind"] == "cka":  # compares the two models by itself
            continue
        if other is None:
            left_out[name] = f"{baseline.name} was not scored on it"
            continue
        dataset, other_dataset = entry["dataset"], other["dataset"]
        if dataset["fingerprint"] != other_dataset["fingerprint"]:
            left_out[name] = "the two were scored on different data (their fingerprints differ)"
            continue
        own, others = model.outcomes(name), baseline.outcomes(name)
        if not own or not others:
            left_out[name] = "it has no outcomes by item, so no interval"
            continue
        for metric in own:
            if metric not in others:
                left_out[name] = f"{baseline.name} has another metric for it"
                continue
            # Tasks on the same images, such as the languages of one benchmark, are resampled together.
            images = dataset.get("images_fingerprint") or dataset["fingerprint"]
            tasks.append(Task(name, metric, entry["group"], own[metric], others[metric], images))
    for name in baseline.tasks:
        if name not in model.tasks:
            left_out[name] = f"{model.name} was not scored on it"
    return Pairing(tasks, left_out)
