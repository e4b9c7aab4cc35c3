"""Results folders like those of `proclip evaluate`, with outcomes that are drawn and not measured."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file


LANGUAGES = ("en", "es", "pt", "it", "fr", "de", "id", "tr", "ru", "zh", "ja", "ko", "ar", "fa")


def entry(name: str, kind: str, group: str, metric: str, value: float, num_items: int, **more) -> dict:
    """A task of results.json."""
    return {
        "name": name,
        "title": more.pop("title", f"Made up, {name}"),
        "kind": kind,
        "group": group,
        "dataset": {
            "source": "made-up",
            "config": None,
            "revision": None,
            "split": "test",
            "num_items": num_items,
            "fingerprint": f"data-{name}",
            "images_fingerprint": "pictures-" + name.split("-language")[0],
        },
        "protocol": more.pop("protocol", {}),
        "metric": metric,
        "value": value,
        "metrics": {metric: value},
        "notes": more.pop("notes", []),
        "items_file": f"items/{name}.safetensors",
        "seconds": 1.0,
        **more,
    }


def write_results(
    folder: Path,
    name: str,
    skill: float,
    seed: int = 0,
    num_items: int = 240,
    languages: int = 14,
    cka: bool = True,
) -> Path:
    """A results folder in which about `skill` of the items are right. The same items are hard for every model."""
    (folder / "items").mkdir(parents=True)
    hardness = np.random.default_rng(7).random((40, num_items))
    noise = np.random.default_rng(seed).normal(0, 0.08, (40, num_items))
    right = hardness + noise < skill
    tasks = []

    def classify(task: str, group: str, correct: np.ndarray, classes: int, metric: str = "top1") -> None:
        labels = np.arange(num_items) % classes
        guesses = np.where(correct, labels, (labels + 1 + (np.arange(num_items) // classes) % 2) % classes)
        items = {"correct": correct.astype(np.uint8), "label": labels, "prediction": guesses}
        save_file(items, folder / "items" / f"{task}.safetensors")
        value = (
            float(correct.mean())
            if metric == "top1"
            else float(np.mean([correct[labels == c].mean() for c in range(classes)]))
        )
        names = [f"thing <{c}>" for c in range(classes)]
        facts = {"num_classes": classes, "classes": names}
        tasks.append(entry(task, "zero_shot", group, metric, value, num_items, protocol=facts))

    classify("things-seen", "classification", right[0], 10)
    classify("things-unseen", "classification", right[1], 10, "mean_per_class")
    classify("sketches", "robustness", right[2], 10)
    rng = np.random.default_rng(seed + 100)
    pictures = num_items // 2
    text_to_image = np.repeat(np.arange(pictures), 2)
    ranks = {
        "i2t_rank": np.where(right[3][:pictures], 0, rng.integers(1, 50, pictures)),
        "t2i_rank": np.where(right[4][: 2 * pictures], 0, rng.integers(1, 50, 2 * pictures)),
        "text_to_image": text_to_image,
    }
    save_file(ranks, folder / "items" / "captions.safetensors")
    value = float(((ranks["i2t_rank"] == 0).mean() + (ranks["t2i_rank"] == 0).mean()) / 2)
    tasks.append(
        entry("captions", "retrieval", "retrieval", "mean_r@1", value, pictures, notes=["2 captions are equal."])
    )
    for number, code in enumerate(LANGUAGES[:languages]):
        classify(
            f"things-language-{code}",
            "multilingual",
            right[5 + number] & (rng.random(num_items) < 1 / (1 + number / 3)),
            10,
        )
    if cka:
        layers = [
            {"layer": layer, "cka": 1 - 0.02 * i, "cka_debiased": 1 - (1.2 - skill) * 0.12 * i}
            for i, layer in enumerate(["patches", "1", "2", "3", "4", "embedding"])
        ]
        tasks.append(
            entry("cka", "cka", "cka", "cka_debiased", layers[-1]["cka_debiased"], num_items, layers=layers)
            | {"items_file": None}
        )
    content = {
        "format_version": 1,
        "complete": True,
        "partial": None,
        "model": {"name": name, "kind": "clip", "weights_sha256": f"{seed:064d}"},
        "protocol": {"text": {"max_length": 77}, "ties": "count against the model"},
        "versions": {"python": "3.12.0", "torch": "2.13.0"},
        "seed": 0,
        "tasks": tasks,
    }
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def write_examples(folder: Path, models: list[str]) -> None:
    """Three examples with small pictures."""

    def uri(color: str) -> str:
        file = io.BytesIO()
        Image.new("RGB", (48, 48), color).save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    examples = [
        {
            "task": "captions",
            "heading": heading,
            "query": f"a {color} square, said to be <b>bold</b> & square",
            "picture": uri(color),
            "found": [{"model": model, "rank": rank + i, "picture": uri("gray")} for i, model in enumerate(models)],
        }
        for heading, color, rank in (("Missed", "red", 4), ("Missed", "blue", 1200), ("Found", "green", 0))
    ]
    (folder / "examples.json").write_text(json.dumps(examples))
