"""What an evaluation writes: `results.json`, and the outcome of every item beside it in `items/`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainers.storage.files import write_file, write_safetensors
from trainers.storage.versions import installed_versions


FORMAT_VERSION = 1
RESULTS_NAME = "results.json"


@dataclass
class Results:
    """The results of one model in `folder`.

    `results.json` is written after every task, so a run that was stopped leaves those that were done; `complete` says whether it is all.

    Attributes:
        folder: gets `results.json` and `items/`.
        model: what [`~Encoder.identity`] gives.
        protocol: how images and texts were read and scores compared; what differs between the tasks is in each of them.
        seed: seed of the rows that a limit draws, and of what is computed from the results.
        partial: None, or what makes the numbers incomparable with the benchmarks': {"limit": rows}.
        tasks: in the order of the suite.
    """

    folder: Path
    model: dict[str, Any]
    protocol: dict[str, Any]
    seed: int
    partial: dict[str, Any] | None = None
    tasks: list[dict[str, Any]] = field(default_factory=list)

    def add(self, task: dict[str, Any], items: dict[str, torch.Tensor]) -> None:
        """Adds the entry of a task, writes its `items` (if it has any) and what there is so far."""
        items_file = f"items/{task['name']}.safetensors" if items else None
        if items_file is not None:
            (self.folder / "items").mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.contiguous() for name, tensor in items.items()}
            write_safetensors(self.folder / items_file, tensors, {"task": task["name"]})
        self.tasks.append({**task, "items_file": items_file})
        self.write(complete=False)

    def write(self, complete: bool) -> None:
        """Writes `results.json` in one piece."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_dict(complete), indent=2, ensure_ascii=False) + "\n"
        write_file(self.folder / RESULTS_NAME, text.encode("utf-8"))

    def as_dict(self, complete: bool = True) -> dict[str, Any]:
        """What `results.json` holds."""
        return {
            "format_version": FORMAT_VERSION,
            "complete": complete,
            "partial": self.partial,
            "model": self.model,
            "protocol": self.protocol,
            "versions": versions(),
            "seed": self.seed,
            "tasks": self.tasks,
        }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("proclip-transformers", "torch", "transformers", "tokenizers", "datasets", "pillow", "torchvision")
    return installed_versions(packages)


def read_results(folder: str | Path) -> dict[str, Any]:
    """What `results.json` in `folder` holds. FileNotFoundError if there is none, ValueError if it is of another format."""
    file = Path(folder) / RESULTS_NAME
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}: `proclip evaluate MODEL --output-dir {folder}` writes it")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        if results["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format is {results['format_version']!r}, and this version reads {FORMAT_VERSION}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the results of an evaluation: {error}") from error
    return results
