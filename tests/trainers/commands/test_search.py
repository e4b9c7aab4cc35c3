"""`proclip index` and `proclip search`, as a person runs them."""

import json

import pytest
from typer.testing import CliRunner

from tests.trainers.search.conftest import write_photos
from tests.trainers.tiny_encoders import tiny_proclip
from trainers.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images in photos/ and a checkpoint in model/."""
    folder = tmp_path_factory.mktemp("here")
    write_photos(folder / "photos")
    (folder / "photos/page.jpg").write_text("<html>")
    for part in tiny_proclip():
        part.save_pretrained(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def run(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result


def test_index_then_search():
    first = run("index", "photos", "--model", "model", "--output", "photos.index", "--export", "photos.parquet")
    assert "photos.index: 10 images; embedded: 10, unreadable files: 1\n" in first.stdout
    assert "unreadable: page.jpg: " in first.stdout and "photos.parquet: 10 rows" in first.stdout
    again = run("index", "photos/", "--output", "photos.index")  # the index knows its model
    assert "10 images; unchanged: 10, unreadable files: 1" in again.stdout and "embedded" not in again.stdout
    found = json.loads(run("search", "photos.index", "a red fox", "--top", "3", "--json").stdout)
    assert len(found) == 3 and all(set(row) == {"path", "score"} for row in found)
    assert sorted(found, key=lambda row: -row["score"]) == found
    lines = run("search", "photos.index", "a red fox", "--top", "3").stdout.splitlines()
    assert [line.split()[1] for line in lines] == [row["path"] for row in found]
    alike = json.loads(
        run("search", "photos.index", "--image", "photos/first/blue.png", "--top", "1", "--json").stdout
    )
    assert alike[0]["path"] == "first/blue.png"
    assert "exact: the query is compared with all 10" in run("search", "photos.index", "a fox", "--explain").stderr
    nothing = run("search", "photos.index", "a fox", "--where", "width > 1000")
    assert nothing.stdout == "" and "no image of photos.index meets the conditions" in nothing.stderr
    cut = run("search", "photos.index", "a long text " * 100)
    assert "does not read the text to its end" in cut.stderr


def test_a_model_that_has_moved(folder):
    run("index", "photos", "--model", "model", "--output", "moved.index")
    (folder / "model").rename(folder / "other place")
    try:
        result = run("search", "moved.index", "a fox", code=1)
        assert "the model that made moved.index is no longer at" in result.stderr
        assert "give its new place with --model" in result.stderr
        run("search", "moved.index", "a fox", "--model", "other place")
    finally:
        (folder / "other place").rename(folder / "model")


def test_a_smaller_index():
    options = ("--truncate-dim", "8", "--precision", "int8")
    run("index", "photos", "--model", "model", "--output", "small.index", *options)
    again = run("index", "photos", "--output", "small.index")
    assert "unchanged: 10" in again.stdout
    image = ("--image", "photos/first/blue.png")
    found = json.loads(run("search", "small.index", *image, "--top", "3", "--json").stdout)
    assert len(found) == 3 and found[0]["path"] == "first/blue.png"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("index", "photos", "--output", "new.index"), "give its model with --model"),
        (("index", "nowhere", "--model", "model", "--output", "new.index"), "nowhere is not a folder"),
        (
            ("index", "photos", "--model", "model", "--output", "new.index", "--truncate-dim", "17"),
            "the embeddings of model have 16 dimensions",
        ),
        (("search", "new.index", "a fox"), "is not an index of images"),
        (("search", "photos.index"), "nothing to search for"),
        (("search", "photos.index", "--image", "nowhere.png"), "nowhere.png"),
        (("search", "photos.index", "a fox", "--where", "colour = 1"), "is not a condition"),
    ],
)
def test_refusals_are_one_line(arguments, message):
    result = run(*arguments, code=1)
    *_, line = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line and "Traceback" not in result.stderr
