"""What `proclip demo` opens."""

import json
from dataclasses import replace

import pytest

from tests.trainers.search.conftest import write_photos
from tests.trainers.tiny_encoders import tiny_proclip
from trainers.demo import sources
from trainers.demo.gallery import Indexing
from trainers.demo.sources import gallery_of, quickstart_galleries, side_by_side
from trainers.openmoji.task import SIZES
from trainers.search.build import index_folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with photos/ and a checkpoint in model/, where the command runs."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos")
    for part in tiny_proclip():
        part.save_pretrained(tmp_path / "model")
    return tmp_path


def test_a_folder_then_its_index(here):
    with pytest.raises(ValueError, match="photos.index is a new index: give its model with --model"):
        gallery_of(here / "photos")
    gallery = gallery_of(here / "photos", "model")
    assert (str(gallery.path), gallery.folder, gallery.title) == ("photos.index", here / "photos", "model")
    index_folder(gallery.path, gallery.folder, gallery.model, gallery.encoder)
    assert gallery_of(here / "photos").folder == here / "photos"
    assert gallery_of(gallery.path).folder is None and len(gallery_of(gallery.path).open()) == 10
    with pytest.raises(NotADirectoryError, match="nowhere is not a folder"):
        gallery_of(here / "nowhere")


def test_two_indexes_have_to_be_of_the_same_images(here):
    gallery = gallery_of(here / "photos", "model")
    write_photos(here / "others")
    for folder in ("photos", "others"):
        index_folder(here / f"{folder}-2.index", here / folder, "model", gallery.encoder)
    assert [g.path.name for g in side_by_side(gallery, here / "photos-2.index")] == ["photos.index", "photos-2.index"]
    with pytest.raises(ValueError, match="is an index of .*others and not of .*photos"):
        side_by_side(gallery, here / "others-2.index")


def test_the_quickstart_s_images(here, monkeypatch):
    with pytest.raises(FileNotFoundError, match="run `proclip quickstart` first, or name an index"):
        quickstart_galleries()
    monkeypatch.setitem(sources.SIZES, "small", replace(SIZES["small"], concepts=10, seen=5))
    output = here / "quickstart-output"
    output.mkdir()
    (here / "model").rename(output / "proclip")
    (output / "results.json").write_text(json.dumps({"size": "small", "seed": 0}))
    galleries, examples = quickstart_galleries()
    assert [gallery.title for gallery in galleries] == ["ProCLIP", "CLIP"] and len(examples) == 4
    images = sorted(galleries[0].folder.glob("*.png"))
    assert len(images) == len({image.read_bytes() for image in images}) == 20
    assert examples[0] in {image.with_suffix(".txt").read_text().strip() for image in images}
    # The teacher reads 24 tokens, which end before the last example names its concept.
    assert galleries[1].encoder.count_truncated(examples) == 1
    indexing = Indexing(galleries)
    indexing.start()
    indexing.wait()
    assert indexing.status == "ProCLIP: 20 images · CLIP: 20 images"
    assert len(quickstart_galleries()[0][0].open()) == 20
