"""A folder of images with captions, and a tiny model to index it with."""

from pathlib import Path

import pytest
from PIL import Image

from tests.trainers.tiny_encoders import tiny_proclip
from trainers.evaluation.scoring.encoders import Encoder
from trainers.search.table import ImageIndex


COLOURS = ["red", "green", "blue", "white", "black", "yellow", "purple", "orange", "gray", "brown"]


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return Encoder(*tiny_proclip(), name="tiny")


def write_photos(folder: Path) -> None:
    """Ten images of one colour each, in two folders; every other one has a caption."""
    for number, colour in enumerate(COLOURS):
        file = folder / ("first" if number < 5 else "second") / f"{colour}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (12 + number, 10), colour)
        image.putpixel((number, 3), (number, 99, 200))
        image.save(file)
        if number % 2 == 0:
            file.with_suffix(".txt").write_text(f"a {colour} wall\n", encoding="utf-8")


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    write_photos(folder)
    return folder


def contents(index: ImageIndex) -> list[dict]:
    """All rows in the order of their paths, but for the signatures, which no other copy of the folder shares."""
    columns = ["path", "checksum", "width", "height", "taken", "caption", "words", "thumbnail", "embedding"]
    return sorted(index.rows(index.images, columns).to_pylist(), key=lambda row: row["path"])
