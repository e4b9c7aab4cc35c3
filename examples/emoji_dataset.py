"""Write what `recipes/laptop.yaml` trains on: the quickstart's pictures, captions and encoders, as files like anybody's own.

    python examples/emoji_dataset.py laptop-data
    proclip train recipes/laptop.yaml

The folder gets `pairs.parquet` (picture, short and long caption), `texts.jsonl` (captions of all concepts, for stage 1), `test.parquet`
(new pictures of all concepts, with captions, name and number of the concept), and the two encoders `clip/` and `llm/`. Drawings: OpenMoji,
CC BY-SA 4.0.
"""

import argparse
import shutil
from importlib.resources import files
from pathlib import Path

import datasets

from trainers.compute.dtypes import native_dtype
from trainers.openmoji.task import SIZES, Picture, Task, draw, make_task
from trainers.quickstart.language_model import unpack_language_model


def rows(task: Task, pictures: list[Picture]) -> datasets.Dataset:
    """A row a picture: image, both captions, and the concept's number and name."""
    columns = {
        "image": draw(task, pictures),
        "short": [picture.short for picture in pictures],
        "long": [picture.long for picture in pictures],
        "label": [picture.concept for picture in pictures],
        "name": [task.concepts[picture.concept].name for picture in pictures],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write to")
    parser.add_argument("--size", choices=list(SIZES), default="full", help="small: for a smoke test")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and captions")
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
        f"{args.output}: {len(pairs):,} pictures with captions, {len(texts):,} texts, {len(test):,} test pictures, clip/, llm/"
    )


if __name__ == "__main__":
    main()
