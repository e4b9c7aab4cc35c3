"""A suite of three small benchmarks, and small models of three families to evaluate on it."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPProcessor

from tests.trainers.tiny_encoders import make_texts, tiny_clip, tiny_proclip
from trainers.evaluation.scoring.encoders import Encoder


NUM_PICTURES = 30


def pictures(count: int = NUM_PICTURES, seed: int = 0) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)) for _ in range(count)]


def write_data(folder: Path) -> Path:
    """Pictures with one to three captions and a label, and a suite file of the three kinds."""
    texts = make_texts(3 * NUM_PICTURES, longest=60)
    captions = [texts[3 * i : 3 * i + 1 + i % 3] for i in range(NUM_PICTURES)]
    columns = {"image": pictures(), "captions": captions, "label": [i % 4 for i in range(NUM_PICTURES)]}
    columns["negative"] = [texts[3 * i + 2] for i in range(NUM_PICTURES)]
    columns["first"] = [some[0] for some in captions]
    features = datasets.Features(
        image=datasets.Image(),
        captions=datasets.List(datasets.Value("string")),
        label=datasets.ClassLabel(names=["red fox", "blue boat", "house", "river"]),
        negative=datasets.Value("string"),
        first=datasets.Value("string"),
    )
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "data.parquet")
    source = f"data: {{source: {folder / 'data.parquet'}, num_items: {NUM_PICTURES}}}"
    (folder / "suite.yaml").write_text(
        f"""
name: all-kinds
tasks:
  - {{name: find, title: Find, kind: retrieval, group: own, {source}, columns: {{image: image, captions: captions}}}}
  - {{name: name, title: Name, kind: zero_shot, group: own, {source}, columns: {{image: image, label: label}},
     classes: {{count: 4, names: feature}}, prompts: ["a {{}}", "photo of {{}}"]}}
  - {{name: tell, title: Tell, kind: fine_grained, group: own, {source},
     columns: {{image: image, caption: first, negative: negative}}}}
"""
    )
    return folder / "suite.yaml"


def tiny_encoder(kind: str = "clip", seed: int = 0) -> Encoder:
    if kind == "proclip":
        return Encoder(*tiny_proclip(max_length=40), "proclip")
    model, tokenizer = tiny_clip(kind)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return Encoder(model, CLIPProcessor(image_processor, tokenizer), kind)


def save(encoder: Encoder, folder: Path) -> Path:
    encoder.model.save_pretrained(folder)
    encoder.processor.save_pretrained(folder)
    return folder
