"""A recipe over random encoders and 24 pictures: everything that `proclip train` reads, in one folder.

Run as a program, it runs the recipe until it kills itself without warning in the middle of stage 2:
`python -m tests.trainers.tiny_recipe RECIPE`.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPProcessor, LlamaConfig, LlamaModel, TrainerCallback

from tests.modeling_proclip import tiny
from tests.trainers.tiny_encoders import make_texts, tiny_clip
from trainers.caption_contrastive.trainer import CaptionContrastiveTrainer
from trainers.recipe.curriculum import Curriculum
from trainers.recipe.schema import load_recipe


NUM_PAIRS, NUM_TEXTS = 24, 40


def write_parts(folder: Path) -> None:
    """The encoders `clip/` and `llm/`, pictures with two captions each `pairs.parquet`, and captions alone `texts.jsonl`."""
    clip, tokenizer = tiny_clip()
    clip.config.vision_config.attention_dropout = 0.2  # so that the result depends on the random state too
    clip.save_pretrained(folder / "clip")
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder / "clip")
    torch.manual_seed(1)
    LlamaModel(LlamaConfig(**tiny.TEXT)).save_pretrained(folder / "llm")
    AutoTokenizer.from_pretrained(tiny.LLAMA_DIR).save_pretrained(folder / "llm")

    pixels = np.random.default_rng(0)
    texts = make_texts(2 * NUM_PAIRS + NUM_TEXTS, longest=8)
    pairs = [
        {
            "image": Image.fromarray(pixels.integers(0, 256, (10, 12, 3), dtype=np.uint8)),
            "short": texts[2 * i],
            "long": texts[2 * i + 1],
        }
        for i in range(NUM_PAIRS)
    ]
    datasets.Dataset.from_list(pairs).to_parquet(folder / "pairs.parquet")
    datasets.Dataset.from_list([{"caption": text} for text in texts[2 * NUM_PAIRS :]]).to_json(folder / "texts.jsonl")


def write_users_folder(folder: Path) -> None:
    """What [`write_parts`] writes, the checkpoint `my-proclip/`, and `photos/` with a caption beside each image."""
    write_parts(folder)
    tiny.model().save_pretrained(folder / "my-proclip")
    tiny.processor(prompt_template=tiny.LLAMA3, max_length=64).save_pretrained(folder / "my-proclip")
    photos = folder / "photos"
    photos.mkdir()
    for number, row in enumerate(datasets.Dataset.from_parquet(str(folder / "pairs.parquet"))):
        row["image"].save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(row["long"], encoding="utf-8")


def settings(folder: Path) -> dict[str, Any]:
    """Stage 1 and stage 2 in a few steps each, with a checkpoint in the middle."""
    pairs = {"source": str(folder / "pairs.parquet"), "text_columns": ["short", "long"]}
    common = {"learning_rate": 1e-2, "save_steps": 2, "logging_steps": 1, "disable_tqdm": True}
    return {
        "output_dir": str(folder / "out"),
        "precision": "float32",
        "model": {
            "vision": str(folder / "clip"),
            "text": str(folder / "llm"),
            "max_length": 64,
            "config": {"adapter_num_layers": 1, "adapter_input_norm": "standardize"},
        },
        "data": {"train": pairs, "texts": {"source": str(folder / "texts.jsonl"), "text_columns": "caption"}},
        "stages": {
            "inheritance": {"global_batch_size": 8, "num_train_epochs": 1, **common},
            "contrastive_tuning": {"global_batch_size": 8, "num_train_epochs": 2, "published_lambda": 4e-4, **common},
        },
    }


def write_recipe(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


class Interrupted(BaseException):
    """What no `except Exception` catches, like the end of the process."""


def interrupt(*args: Any, **kwargs: Any) -> None:
    raise Interrupted


class DieAt(TrainerCallback):
    """Calls `die` at the end of an optimizer step."""

    def __init__(self, step: int, die):
        self.step, self.die = step, die

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.die()


def die_in_stage(curriculum: Curriculum, stage: str, step: int, die) -> None:
    """Make the trainer of `stage` die at the end of an optimizer step."""
    make = curriculum._trainer

    def trainer(name: str, *args: Any):
        made = make(name, *args)
        if name == stage:
            made.add_callback(DieAt(step, die))
        return made

    curriculum._trainer = trainer  # type: ignore[method-assign]


def die_in_stage_0(monkeypatch, step: int) -> None:
    """Make the trainer of stage 0 die at the end of an optimizer step."""
    init = CaptionContrastiveTrainer.__init__

    def with_death(self, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.add_callback(DieAt(step, interrupt))

    monkeypatch.setattr(CaptionContrastiveTrainer, "__init__", with_death)


if __name__ == "__main__":
    running = Curriculum(load_recipe(sys.argv[1]))
    die_in_stage(running, "contrastive_tuning", 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    running.run()
