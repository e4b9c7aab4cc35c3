"""The captions files that data sets are published with: COCO's, Karpathy's splits, and Flickr30k's. Rows {"image": name, "caption": [captions]}."""

import re
from collections.abc import Iterator
from typing import Any

from .text_lines import read_lines


TOKEN_ENDINGS = (".token", ".token.txt")

_TOKEN_LINE = re.compile(r"(.+)#\d+\t(.*)")


def is_coco(content: Any) -> bool:
    """Whether a JSON file is one of COCO's: images and annotations that refer to them by number."""
    return isinstance(content, dict) and isinstance(content.get("annotations"), list) and "images" in content


def coco_rows(content: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The images of COCO's `captions_*.json` in their order, each with its captions. ValueError if it is not made like that; names the file."""
    captions: dict[Any, list[str]] = {}
    try:
        images = {image["id"]: image["file_name"] for image in content["images"]}
        if len(images) < len(content["images"]):
            raise ValueError(f"{path} gives two images the same id")
        for number, annotation in enumerate(content["annotations"], 1):
            if "caption" not in annotation:
                raise ValueError(f"{path}: annotation {number} has no caption: take the file captions_*.json of COCO")
            if annotation["image_id"] not in images:
                raise ValueError(
                    f"{path}: annotation {number} is of the image {annotation['image_id']}, which is not among the images"
                )
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not made as COCO's captions: images need id and file_name, annotations image_id and caption ({error})"
        ) from error
    for number, (image, name) in enumerate(images.items(), 1):
        yield f"image {number}", {"image": name, "caption": captions.get(image, [])}


def is_karpathy(content: Any) -> bool:
    """Whether a JSON file is one of Karpathy's (`dataset_coco.json`): images with sentences."""
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        return False
    return all(isinstance(image, dict) and "sentences" in image for image in content["images"][:1])


def karpathy_rows(content: dict[str, Any], path: str, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The images of Karpathy's `dataset_*.json` that belong to `split` ("train+restval" joins two; None: all), each with its captions. ValueError if the
    file is not made like that, or has no such split.
    """
    splits: dict[str, None] = {}
    for number, image in enumerate(content["images"], 1):
        try:
            name = "/".join([image["filepath"], image["filename"]] if image.get("filepath") else [image["filename"]])
            row = {
                "image": name,
                "caption": [sentence["raw"] for sentence in image["sentences"]],
                "split": image["split"],
            }
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, image {number} is not made as Karpathy's: it needs filename, split, and sentences with raw ({error})"
            ) from error
        splits[row["split"]] = None
        if split is None or row["split"] in split.split("+"):
            yield f"image {number}", row
    missing = [name for name in (split or "").split("+") if name and name not in splits]
    if missing:
        raise ValueError(f"{path} has no images of the split {missing[0]!r}; it has {', '.join(splits)}")


def token_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The images of Flickr30k's `results_*.token`, whose lines are IMAGE#NUMBER, a tab and a caption; the captions of an image follow each other."""
    row: dict[str, Any] | None = None
    place = ""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        found = _TOKEN_LINE.fullmatch(line.rstrip("\r\n"))
        if found is None:
            raise ValueError(
                f"{path}, line {number}: expected IMAGE#NUMBER, a tab and a caption, found {line.strip()!r:.80}"
            )
        image, caption = found.groups()
        if row is None or row["image"] != image:
            if row is not None:
                yield place, row
            row, place = {"image": image, "caption": []}, f"line {number}"
        row["caption"].append(caption)
    if row is not None:
        yield place, row
