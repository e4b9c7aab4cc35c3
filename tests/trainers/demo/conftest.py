"""Two galleries of the same ten images: a tiny ProCLIP's and a tiny CLIP's, which reads fewer tokens."""

from pathlib import Path

import pytest
from transformers import CLIPImageProcessorPil, CLIPProcessor

from tests.trainers.search.conftest import write_photos
from tests.trainers.tiny_encoders import tiny_clip, tiny_proclip
from trainers.demo.gallery import Gallery
from trainers.evaluation.scoring.encoders import Encoder


LONG = "two red fox under the house " * 20


def make_galleries(folder: Path, photos: Path) -> list[Gallery]:
    clip, tokenizer = tiny_clip()
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    encoders = {
        "ProCLIP": Encoder(*tiny_proclip(max_length=1024), name="proclip"),
        "CLIP": Encoder(clip, CLIPProcessor(image_processor, tokenizer), name="clip"),
    }
    return [
        Gallery(title, folder / f"{title}.index", encoder, encoder.name, photos) for title, encoder in encoders.items()
    ]


@pytest.fixture(scope="module")
def galleries(tmp_path_factory) -> list[Gallery]:
    """Not indexed yet."""
    folder = tmp_path_factory.mktemp("gallery")
    write_photos(folder / "photos")
    (folder / "photos/<img src=x onerror=alert(1)>.jpg").write_text("<html>")
    return make_galleries(folder, folder / "photos")
