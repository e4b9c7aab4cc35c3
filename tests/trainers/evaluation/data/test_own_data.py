"""Data of somebody else: it is found where people keep it, and reaches nothing outside of its folder."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from trainers.evaluation.data.manifest import Classes, Data, Manifest, own_images
from trainers.evaluation.data.sources import OpenedData, class_names, open_data
from trainers.evaluation.scoring.tasks import prepare_task


def images_in(folder: Path, count: int = 3) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (80 * i, 9, 9)).save(folder / f"{i}.png")
    return folder


def captions_at(file: Path, names: list[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("image,caption\n" + "".join(f"{name},caption {i}\n" for i, name in enumerate(names)))
    return file


def found(images: str | Path, captions: str | Path) -> list[Path]:
    rows = open_data(own_images(Path(images), Path(captions), "image", "caption")).rows
    assert list(rows["caption"]) == [[f"caption {i}"] for i in range(len(rows))]
    return [Path(path) for path in rows["image"]]


@pytest.mark.parametrize("place", ["", "data", "data/images/photos"])
@pytest.mark.parametrize("prefix", ["", "photos/", "absolute"])
@pytest.mark.parametrize("captions", ["captions.csv", "data/captions.csv", "data/images/photos/captions.csv"])
def test_images_are_found_however_their_names_are_written(tmp_path, monkeypatch, captions, prefix, place):
    images = images_in(tmp_path / "data/images/photos")
    prefix = f"{images}/" if prefix == "absolute" else prefix
    captions_at(tmp_path / captions, [f"{prefix}{i}.png" for i in range(3)])
    monkeypatch.chdir(tmp_path / place)
    expected = [images / f"{i}.png" for i in range(3)]
    relative = os.path.relpath(images)
    for given in (images, Path(relative), Path(relative + "/")):
        assert found(given, os.path.relpath(tmp_path / captions)) == expected


def test_names_as_seen_from_the_captions_file(tmp_path, monkeypatch):
    images = images_in(tmp_path / "data/images/photos")
    captions_at(tmp_path / "data/captions.csv", [f"images/photos/{i}.png" for i in range(3)])
    monkeypatch.chdir(tmp_path)
    assert found("data/images/photos", "data/captions.csv") == [images / f"{i}.png" for i in range(3)]


def test_one_reading_of_the_names_holds_for_all_rows(tmp_path):
    """The first row's image is there twice; the second one's only where the first reading does not look."""
    images = images_in(tmp_path / "photos")
    (images / "photos").mkdir()
    (images / "0.png").rename(images / "photos/0.png")
    captions = captions_at(tmp_path / "captions.csv", ["photos/0.png", "photos/1.png"])
    with pytest.raises(
        FileNotFoundError, match=r"captions.csv, line 3 names the image 'photos/1.png': there is no file"
    ):
        found(images, captions)


@pytest.mark.parametrize("name", ["../secret.png", "{outside}", "link.png", "folder/secret.png", "pipe.png"])
def test_a_row_reaches_no_file_outside(tmp_path, name):
    images, outside = images_in(tmp_path / "photos"), images_in(tmp_path / "private") / "secret.png"
    (tmp_path / "private/0.png").rename(outside)
    (images / "link.png").symlink_to(outside)
    (images / "folder").symlink_to(outside.parent)
    os.mkfifo(images / "pipe.png")
    captions = captions_at(tmp_path / "captions.csv", ["0.png", name.format(outside=outside)])
    with pytest.raises((ValueError, OSError), match=r"captions.csv, line 3 names the image"):
        found(images, captions)


def test_captions_of_several_types_and_files_without_rows_are_named(tmp_path):
    images = images_in(tmp_path / "photos")
    rows = [{"image": f"{i}.png", "caption": caption} for i, caption in enumerate(["a fox", 7])]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    own = own_images(images, tmp_path / "a.json", "image", "caption")
    with pytest.raises(ValueError, match=r"benchmark photos, a.json, row 2: a caption is not text, but 7"):
        prepare_task(own, open_data(own))
    captions_at(tmp_path / "b.csv", [])
    with pytest.raises(ValueError, match=r"benchmark photos: .*b.csv has no rows"):
        found(images, tmp_path / "b.csv")


def manifest(**data) -> Manifest:
    return Manifest(
        name="m",
        title="m",
        kind="retrieval",
        group="own",
        data=Data(**data),
        columns={"image": "image", "captions": "caption"},
    )


@pytest.mark.parametrize("file", ["../elsewhere.csv", "{absolute}", "link.csv"])
def test_a_manifest_reaches_no_file_outside_of_its_source(tmp_path, file):
    images_in(tmp_path / "data/photos")
    elsewhere = captions_at(tmp_path / "elsewhere.csv", ["0.png", "1.png"])
    (tmp_path / "data/link.csv").symlink_to(elsewhere)
    data = {"source": str(tmp_path / "data"), "layout": "caption_file", "image_folder": "photos"}
    with pytest.raises(ValueError, match="benchmark m: .* lies outside of"):
        open_data(manifest(**data, caption_file=file.format(absolute=elsewhere)))
    captions_at(tmp_path / "data/captions.csv", ["0.png", "1.png"])
    assert len(open_data(manifest(**data, caption_file="captions.csv")).rows) == 2
    data["image_folder"] = "../data/../data/../"
    with pytest.raises(ValueError, match="benchmark m: .* lies outside of"):
        open_data(manifest(**data, caption_file="captions.csv"))


def test_a_folder_of_captions_has_no_links_out_of_it(tmp_path):
    folder = tmp_path / "data"
    images_in(folder / "image", 1)
    (folder / "caption").mkdir()
    (tmp_path / "secret.txt").write_text("a secret")
    (folder / "caption/0.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="benchmark m: 'caption/0.txt' lies outside of"):
        open_data(manifest(source=str(folder), layout="caption_folder"))


@pytest.mark.parametrize(
    "names", ["source:../secret.txt", "source:{absolute}", "resource:../../../../../../{absolute}"]
)
def test_class_names_come_from_no_file_outside(tmp_path, names):
    secret = tmp_path / "secret.txt"
    secret.write_text("TOP\nSECRET\n")
    (tmp_path / "data").mkdir()
    data = OpenedData(None, "data", tmp_path / "data")
    with pytest.raises(ValueError, match="lies outside of|there is no resource"):
        class_names(Classes(count=2, names=names.format(absolute=secret)), data, None, "benchmark m")
    remote = dataclasses.replace(data, folder=None, source="owner/name")
    with pytest.raises(ValueError, match="lies outside of the dataset|there is no resource"):
        class_names(Classes(count=2, names=names.format(absolute=secret)), remote, None, "benchmark m")


def test_an_expression_that_backtracks_ends_soon(monkeypatch):
    monkeypatch.setattr("trainers.evaluation.data.sources._SECONDS_FOR_EDITS", 0.2)
    classes = Classes(count=2, names=["a" * 60 + "!", "b"], edit=[["(a|aa)+$", ""]])
    with pytest.raises(ValueError, match="takes more than 0.2 seconds"):
        class_names(classes, OpenedData(None, "data", None), None, "benchmark m")
    for wrong in (["(", ""], ["a", r"\9"]):
        with pytest.raises(ValueError, match="benchmark m: edit .* is not a regular expression"):
            class_names(
                dataclasses.replace(classes, edit=[wrong]), OpenedData(None, "data", None), None, "benchmark m"
            )
