"""Small data of the schema that a manifest states, and a model whose every score on it is known by construction.

The model reads a colour: a picture whose colour is the number of a text has the very embedding of that text, and embeddings of different
texts point in random directions. So a picture is right where it shows the number of its own text, and wrong where it shows another's.
"""

import csv
import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from tests.trainers.tiny_encoders import tiny_clip
from trainers.evaluation.data.manifest import Manifest
from trainers.evaluation.scoring.encoders import Encoder


DIM = 256


class ColorModel(torch.nn.Module):
    """Neither a CLIP nor of Transformers: a module with the two functions, and no config."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.dim = dim
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen_images = self.seen_texts = 0

    def vectors(self, numbers: list[int]) -> torch.Tensor:
        return torch.stack([torch.randn(self.dim, generator=torch.Generator().manual_seed(n)) for n in numbers])

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.seen_images += len(pixel_values)
        weights = torch.tensor([65536, 256, 1])
        return self.scale * self.vectors(((pixel_values[:, :, 0, 0].long()) * weights).sum(1).tolist())

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        self.seen_texts += len(input_ids)
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return self.vectors([number_of_tokens(row) for row in rows])


def number_of_tokens(tokens: list[int]) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(tokens).encode()).digest()[:3], "big")


class ColorWorld:
    """The model with its processor, and pictures of texts."""

    def __init__(self, model: ColorModel | None = None):
        self.model = model or ColorModel()
        self.tokenizer = tiny_clip()[1]
        self.tokenizer.model_max_length = 77
        plain = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
        self.processor = SimpleNamespace(image_processor=CLIPImageProcessorPil(**plain), tokenizer=self.tokenizer)

    def encoder(self, name: str = "colors") -> Encoder:
        return Encoder(self.model, self.processor, name)

    def picture(self, text: str, shade: int = 0) -> bytes:
        """A PNG that shows `text`; another `shade` makes other bytes with the same embedding."""
        number = number_of_tokens(self.tokenizer(text, truncation=True)["input_ids"])
        image = Image.new("RGB", (4, 4), (number >> 16, number >> 8 & 255, number & 255))
        image.putpixel((3, 3), (shade, shade, shade))
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()


@dataclasses.dataclass
class StandIn:
    """A manifest for less data, where that lies, and its value by construction."""

    manifest: Manifest
    path: Path
    value: float
    num_images: int


def stand_in(manifest: Manifest, world: ColorWorld, folder: Path) -> StandIn:
    """Data of `manifest`'s schema with few rows; its counts are set to theirs, and long prompt ensembles cut to two prompts or one."""
    changes: dict[str, Any] = {}
    if manifest.kind == "zero_shot":
        changes["prompts"] = manifest.prompt_templates[: 2 if manifest.classes.count <= 200 else 1]
        manifest = dataclasses.replace(manifest, **changes)
        rows, value = _zero_shot_rows(manifest, world)
    elif manifest.kind == "fine_grained":
        rows, value = _fine_grained_rows(manifest, world)
    elif manifest.kind == "linear_probe":
        return _probe(manifest, world, folder / manifest.name)
    else:
        rows, value = _caption_rows(manifest, world)
    own = manifest.data
    counted = {"num_items": len(rows)}
    if manifest.kind == "retrieval":
        counted["num_captions"] = sum(min(len(row["captions"]), manifest.max_captions or 99) for row in rows)
    if own.first is not None:
        counted["first"] = len(rows)
    layout = own.layout if own.layout != "openmoji" else "table"
    manifest = dataclasses.replace(manifest, data=dataclasses.replace(own, layout=layout, **counted))
    writer = {"caption_file": _write_caption_file, "caption_folder": _write_caption_folder, "mmvp": _write_mmvp}
    path = folder / manifest.name
    writer.get(layout, _write_table)(manifest, rows, path)
    return StandIn(manifest, path, value, len({row[key] for row in rows for key in row if key.startswith("image")}))


def _probe(manifest: Manifest, world: ColorWorld, path: Path) -> StandIn:
    """Pictures of three classes to learn, six of each; of the four to test, one bears another class's label."""
    names = [f"thing {i}" for i in range(manifest.classes.count)]

    def row(label: int, shown: int, shade: int) -> dict[str, Any]:
        return {"image": world.picture(names[shown], shade), "label": label, "names": names}

    train = [row(label, label, shade) for label in (0, 1, 2) for shade in range(6)]
    test = [row(0, 0, 7), row(0, 1, 8), row(1, 1, 9), row(2, 2, 9)]
    parts = {}
    for part, rows in (("data", test), ("train", train)):
        own = getattr(manifest, part)
        split = {"data": "test", "train": "train"}[part] if own.layout == "openmoji" else own.split
        parts[part] = dataclasses.replace(own, num_items=len(rows), layout="table", split=split)
        _write_table(dataclasses.replace(manifest, data=parts[part]), rows, path)
    manifest = dataclasses.replace(manifest, **parts)
    value = {"accuracy": 3 / 4, "mean_per_class": (1 / 2 + 1 + 1) / 3}[manifest.primary_metric]
    return StandIn(manifest, path, value, len(train) + len(test))


def _caption_rows(manifest: Manifest, world: ColorWorld) -> tuple[list[dict], float]:
    """Six rows. Of the last two, each shows the other's caption: they are missed, both ways, and 4 of 6 are found."""
    texts = [f"{world_text} number {i} of {manifest.name}" for i, world_text in enumerate(["a fox", "two boats"] * 3)]
    shown = [0, 1, 2, 3, 5, 4]
    many = manifest.caption_separator is not None or manifest.data.layout == "table"
    rows = []
    for i, text in enumerate(texts):
        captions = [text] * (7 if many else 1)  # the same again: all are found or none
        if manifest.kind == "caption_retrieval":
            captions = [text, texts[shown[i]], "another caption"]
        rows.append({"image": world.picture(texts[shown[i]]), "captions": captions})
    return rows, 4 / 6


def _zero_shot_rows(manifest: Manifest, world: ColorWorld) -> tuple[list[dict], float]:
    """Of class 0 three of four pictures are right, of class 1 one of one, of the last class one of one."""
    classes = manifest.classes
    if classes.names == "feature":
        names = [f"thing_{i}" for i in range(classes.count)]
    else:
        from trainers.evaluation.data.manifest import resource_lines

        names = resource_lines(classes.names.removeprefix("resource:"))
        names = names if classes.pick is None else [names[i] for i in classes.pick]
    import re

    read = names
    for pattern, replacement in classes.edit:
        read = [re.sub(pattern, replacement, name) for name in read]
    last = classes.count - 1
    rows = []
    for number, (label, shown) in enumerate([(0, 0), (0, 0), (0, 1), (1, 1), (last, last), (0, 0)]):
        picture = world.picture(manifest.prompt_templates[0].replace("{}", read[shown]), number)
        rows.append({"image": picture, "label": label})
    rows[0]["names"] = names
    return rows, {"top1": 5 / 6, "mean_per_class": (3 / 4 + 1 + 1) / 3}[manifest.primary_metric]


def _fine_grained_rows(manifest: Manifest, world: ColorWorld) -> tuple[list[dict], float]:
    frame = manifest.prompt_templates[0]
    rows = []
    if "image" in manifest.columns:  # three show the caption, one shows the negative
        for i in range(4):
            good, bad = f"{manifest.name} dog {i} on grass", f"{manifest.name} cat {i} on grass"
            picture = world.picture(frame.replace("{}", bad if i == 3 else good), i)
            rows.append({"image": picture, "caption": good, "negative": bad})
        return rows, 3 / 4
    # Two pairs are right, one is exchanged, and of one both pictures show the first text: they tie.
    for i, (first, second) in enumerate([(0, 1), (0, 1), (1, 0), (0, 0)]):
        texts = [f"open door {i}", f"shut door {i}"]
        pictures = [
            world.picture(frame.replace("{}", texts[shown]), shade) for shade, shown in enumerate((first, second))
        ]
        row = {"image_1": pictures[0], "image_2": pictures[1], "caption_1": texts[0], "caption_2": texts[1]}
        rows.append({**row, "category": "state" if i < 2 else "place"})
    return rows, 2 / 4


def _write_table(manifest: Manifest, rows: list[dict], path: Path) -> None:
    columns, data = manifest.columns, manifest.data
    if data.files is not None:
        return write_tar(manifest, rows, path)
    content: dict[str, list] = {}
    features: dict[str, Any] = {}
    for key, column in columns.items():
        if key == "image":
            content[column] = [{"bytes": row["image"], "path": None} for row in rows]
            features[column] = datasets.Image()
        elif key == "label":
            content[column] = [row["label"] for row in rows]
            features[column] = datasets.Value("int64")
            if manifest.classes.names == "feature":
                features[column] = datasets.ClassLabel(names=rows[0]["names"])
        elif key == "captions":
            content[column] = [row["captions"] for row in rows]
            features[column] = datasets.List(datasets.Value("string"))
            if manifest.caption_separator is not None:
                raise AssertionError("a table of lists needs no separator")
        else:
            content[column] = [row[key] for row in rows]
            features[column] = datasets.Value("string")
    content["unused"] = list(range(len(rows)))
    features["unused"] = datasets.Value("int64")
    (path / "data").mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    if (
        len(data.split) == 2 or data.split == "fil" or data.split == "quz"
    ):  # a language: `datasets` knows no such split by a file's name
        datasets.DatasetDict({data.split: table}).save_to_disk(path)
    else:
        table.to_parquet(path / "data" / f"{data.split}-00000-of-00001.parquet")


def write_tar(manifest: Manifest, rows: list[dict], path: Path) -> None:
    """A WebDataset as the repositories `wds_...` have it: `test/0.tar`, a file for each column."""
    (path / manifest.data.split).mkdir(parents=True)
    for name in ("classnames.txt", "zeroshot_classification_templates.txt", "test/nshards.txt"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("1\n")
    with tarfile.open(path / manifest.data.split / "0.tar", "w") as tar:
        for i, row in enumerate(rows):
            for key, column in manifest.columns.items():
                value = row[key]
                if key == "captions":
                    value = manifest.caption_separator.join(value)
                content = value if isinstance(value, bytes) else str(value).encode()
                info = tarfile.TarInfo(f"s{i:07d}.{column}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _write_caption_file(manifest: Manifest, rows: list[dict], path: Path) -> None:
    data, pictures = manifest.data, path / manifest.data.image_folder
    pictures.mkdir(parents=True, exist_ok=True)
    written: list[dict] = []
    for i, row in enumerate(rows):
        (pictures / f"picture {i}.png").write_bytes(row["image"])
        out: dict[str, Any] = {"unused": i, **data.where}
        values = {**row, "image": f"picture {i}.png"}
        for key, column in manifest.columns.items():
            value = values[key][0] if key == "captions" else values[key]
            if "." not in column:
                out[column] = value
            else:  # conversations.1.value
                name, place, inner = column.split(".")
                out[name] = [{inner: "Describe it."}] * int(place) + [{inner: value}]
        written.append(out)
    for key in data.where:
        written.append({**written[0], key: "another"})
    if data.first is not None:  # rows after the first ones are not looked at
        written.append({"unused": "and its picture is not there"})
    file = path / data.caption_file
    if file.suffix == ".jsonlines":
        file.write_text("".join(json.dumps(row) + "\n" for row in written))
    elif manifest.kind == "fine_grained":
        file.write_text(json.dumps({str(i): row for i, row in enumerate(written)}))
    else:
        file.write_text(json.dumps(written))


def _write_caption_folder(manifest: Manifest, rows: list[dict], path: Path) -> None:
    (path / "image").mkdir(parents=True)
    (path / "caption").mkdir()
    for i, row in enumerate(rows):
        (path / "image" / f"{i}.jpg").write_bytes(row["image"])
        (path / "caption" / f"{i}.txt").write_text(row["captions"][0] + "\na second line\n")


def _write_mmvp(manifest: Manifest, rows: list[dict], path: Path) -> None:
    path.mkdir(parents=True)
    with open(path / "Questions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Question ID", "Type", "Statement"])
        for i, row in enumerate(rows):
            folder = path / "MLLM_VLM Images" / row["category"]
            folder.mkdir(parents=True, exist_ok=True)
            for place in (1, 2):
                number = 2 * i + place
                (folder / f"{number}.jpg").write_bytes(row[f"image_{place}"])
                writer.writerow([number, row["category"], row[f"caption_{place}"]])
