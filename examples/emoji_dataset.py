"""Write what `recipes/laptop.yaml` trains on: the quickstart's images, captions and encoders, as files like anybody's own.

    python examples/emoji_dataset.py laptop-data
    proclip train recipes/laptop.yaml

The folder gets `pairs.parquet` (image, short and long caption), `texts.jsonl` (captions of all concepts, for stage 1), `test.parquet`
(new images of all concepts, with captions, name and number of the concept), and the two encoders `clip/` and `llm/`. Drawings: OpenMoji,
CC BY-SA 4.0.
"""

import argparse
import shutil
from importlib.resources import files
from pathlib import Path

import datasets

from trainers.compute.dtypes import native_dtype
from trainers.openmoji.task import SIZES, Task, TaskImage, draw, make_task
from trainers.quickstart.language_model import unpack_language_model


def rows(task: Task, images: list[TaskImage]) -> datasets.Dataset:
    """A row an image: the image, both captions, and the concept's number and name."""
    columns = {
        "image": draw(task, images),
        "short": [image.short for image in images],
        "long": [image.long for image in images],
        "label": [image.concept for image in images],
        "name": [task.concepts[image.concept].name for image in images],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write to")
    parser.add_argument("--size", choices=list(SIZES), default="full", help="small: for a smoke test")
    parser.add_argument("--seed", type=int, default=0, help="seed of images and captions")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    args.output.mkdir(parents=True, exist_ok=True)
    task = make_task(SIZES[args.size], args.seed)
    pairs, test = rows(task, task.alignment), rows(task, task.retrieval)
    texts = datasets.Dataset.from_dict({"text": task.inheritance_texts})
    pairs.to_parquet(args.output / "pairs.parquet")
    test.to_parquet(args.output / "test.parquet")
    texts.to_json(args.output / "texts.jsonl", force_ascii=False)
    shutil.copytree(
        str(files("trainers.quickstart") / "assets" / "emoji-clip"), args.output / "clip", dirs_exist_ok=True
    )
    unpack_language_model(args.output / "llm", native_dtype())
    print(
        f"{args.output}: {len(pairs):,} images with captions, {len(texts):,} texts, {len(test):,} test images, clip/, llm/"
    )


if __name__ == "__main__":
    main()
