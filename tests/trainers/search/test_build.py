"""An index follows its folder: what is new, changed, moved, copied or deleted is found, and only new content is embedded."""

import json
import os
import shutil

import lancedb
import pyarrow as pa
import pytest
import torch
from PIL import Image, PngImagePlugin

from tests.trainers.search.conftest import contents
from tests.trainers.tiny_encoders import tiny_proclip
from trainers.evaluation.scoring.encoders import Encoder
from trainers.search import build
from trainers.search.build import index_folder
from trainers.search.query import Question, embed_image, search
from trainers.search.table import ImageIndex


@pytest.fixture
def run(photos, encoder, tmp_path):
    """Indexes the photos and returns the index and its summary."""
    return lambda **options: index_folder(tmp_path / "photos.index", photos, "tiny", encoder, **options)


def test_rows_hold_what_the_files_hold(run, photos, encoder):
    index, summary = run(batch_size=3)
    assert (summary.total, summary.embedded, summary.unreadable, summary.duplicates) == (10, 10, [], 0)
    row = next(row for row in contents(index) if row["path"] == "first/blue.png")
    assert (row["width"], row["height"], row["caption"], row["words"]) == (
        14,
        10,
        "a blue wall",
        "a blue wall first blue",
    )
    torch.testing.assert_close(torch.tensor(row["embedding"]), embed_image(encoder, photos / "first/blue.png"))


def test_a_second_run_embeds_nothing(run, monkeypatch):
    first, _ = run()
    before = contents(first)
    monkeypatch.setattr(build, "decode_image", lambda data: pytest.fail("an image was decoded again"))
    index, summary = run()
    assert (summary.unchanged, summary.embedded, summary.reused, summary.removed) == (10, 0, 0, 0)
    assert contents(index) == before


def test_moved_copied_deleted_and_new_files(run, photos):
    run()
    (photos / "first/red.png").rename(photos / "moved.png")
    shutil.copyfile(photos / "first/green.png", photos / "copied.png")
    (photos / "first/black.png").unlink()
    Image.new("RGB", (9, 9), "pink").save(photos / "pink.png")
    index, summary = run()
    assert (summary.embedded, summary.reused, summary.removed, summary.duplicates) == (1, 2, 2, 1)
    paths = [row["path"] for row in contents(index)]
    assert {"moved.png", "copied.png", "pink.png"} <= set(paths) and len(paths) == 11
    assert not {"first/red.png", "first/black.png"} & set(paths)


def test_content_that_changes_hands(run, photos, encoder):
    """Files are exchanged and overwritten: every row has the embedding of what its file holds now."""
    run()
    files = [photos / "first/red.png", photos / "first/green.png", photos / "second/gray.png"]
    red, green, gray = (file.read_bytes() for file in files)
    for file, data in zip(files, (green, red, red)):
        file.write_bytes(data)
    (photos / "kept.png").write_bytes(gray)  # whose only other copy has just been overwritten
    index, _ = run()
    fresh, _ = index_folder(photos.parent / "fresh.index", photos, "tiny", encoder)
    assert contents(index) == contents(fresh)


def test_another_image_of_the_same_name_size_and_time(run, photos):
    """What `rsync -t`, `cp -p` and `tar` leave: equal name, size and time, other content."""
    run()
    file = photos / "first/red.png"
    stat = file.stat()
    data = bytearray(file.read_bytes())
    other = Image.new("RGB", (12, 10), (254, 0, 0))
    other.putpixel((0, 3), (0, 99, 200))
    other.save(photos / "other.tmp", "PNG")
    changed = (photos / "other.tmp").read_bytes()
    assert len(changed) == len(data) and changed != data
    file.write_bytes(changed)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    _, summary = run()
    assert summary.embedded == 1


def test_a_caption_that_changes(run, photos):
    run()
    (photos / "first/red.txt").write_text("a brick wall")
    (photos / "first/blue.txt").unlink()
    index, summary = run()
    captions = {row["path"]: row["caption"] for row in contents(index)}
    assert (captions["first/red.png"], captions["first/blue.png"]) == ("a brick wall", None)
    assert (summary.embedded, summary.reused) == (0, 2)


def test_captions_under_other_endings_and_in_other_encodings(run, photos, caplog):
    (photos / "first/red.txt").rename(photos / "first/red.TXT")
    (photos / "first/blue.txt").write_bytes(b"caf\xe9")
    index, _ = run()
    captions = {row["path"]: row["caption"] for row in contents(index)}
    assert captions["first/red.png"] and captions["first/blue.png"] is None
    assert "blue.png is indexed without its caption: " in caplog.text and "byte 4 is 0xE9" in caplog.text


def test_a_hostile_folder(run, photos, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("RGB", (5, 5), "cyan").save(outside / "secret.png")
    (photos / "page.jpg").write_text("<html><img src='http://localhost/'></html>")
    (photos / "drawing.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (photos / "paper.jpg").write_bytes(b"%PDF-1.7\n")
    (photos / "empty.jpg").touch()
    (photos / "cut.png").write_bytes((photos / "first/red.png").read_bytes()[:60])
    Image.new("1", (20_000, 20_000)).save(photos / "bomb.png")
    Image.new("RGB", (1, 1), "red").save(photos / "one pixel.png")
    Image.new("RGB", (9, 9), "navy").save(photos / "quo'te; DROP TABLE images --.png")
    (photos / "loop").symlink_to(photos, target_is_directory=True)
    (photos / "away").symlink_to(outside, target_is_directory=True)
    (photos / "link.png").symlink_to(outside / "secret.png")
    os.mkfifo(photos / "pipe.png")
    # A program in PostScript, which Pillow would run by Ghostscript.
    (photos / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n")
    shutil.copyfile(photos / "first/red.png", photos / "line\nbreak \x1b[2J.png")
    shutil.copyfile(photos / "first/red.png", photos / ("--" + "ü" * 100 + " 狐狸🦊.png"))
    shutil.copyfile(photos / "first/red.png", os.fsencode(photos) + b"/latin \xfc.png")
    (photos / "._red.png").write_bytes(b"Mac OS X")
    (photos / "folder.png").mkdir()
    index, summary = run()
    paths = {row["path"] for row in contents(index)}
    assert {"one pixel.png", "quo'te; DROP TABLE images --.png", "line\nbreak \x1b[2J.png"} <= paths and len(
        paths
    ) == 14
    assert [path for path, _ in summary.unreadable] == [
        "bomb.png",
        "cut.png",
        "drawing.png",
        "empty.jpg",
        "latin \udcfc.png",
        "page.jpg",
        "paper.jpg",
        "program.jpg",
    ]
    assert dict(summary.unreadable)["program.jpg"].startswith("an EPS file is a program")
    assert all(reason for _, reason in summary.unreadable) and summary.num_links == 3
    # The second run knows them, and one that has become an image is taken in.
    Image.new("RGB", (9, 9), "lime").save(photos / "empty.jpg")
    (photos / "page.jpg").unlink()
    (photos / "quo'te; DROP TABLE images --.png").unlink()
    _, summary = run()
    assert (summary.total, summary.embedded, summary.removed, len(summary.unreadable)) == (14, 1, 1, 6)


def test_an_image_that_becomes_unreadable_leaves_the_index(run, photos):
    run()
    (photos / "first/red.png").write_bytes(b"no longer")
    index, summary = run()
    assert "first/red.png" not in {row["path"] for row in contents(index)}
    assert [path for path, _ in summary.unreadable] == ["first/red.png"]


def test_the_date_is_the_camera_s(run, photos):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2024:05:17 18:30:00"
    Image.new("RGB", (9, 9), "teal").save(photos / "dated.jpg", exif=exif)
    exif.get_ifd(0x8769)[0x9003] = "yesterday"
    Image.new("RGB", (9, 8), "teal").save(photos / "misdated.jpg", exif=exif)
    broken = PngImagePlugin.PngInfo()
    broken.add(b"eXIf", b"MM\x00*garbage")
    Image.new("RGB", (8, 9), "teal").save(photos / "broken.png", pnginfo=broken)
    index, _ = run()
    taken = {row["path"]: row["taken"] for row in contents(index)}
    assert taken["dated.jpg"] == "2024-05-17T18:30:00"
    assert taken["misdated.jpg"] is taken["broken.png"] is None


def test_another_model_or_folder_is_refused(run, photos, tmp_path, encoder):
    run()
    other = Encoder(*tiny_proclip(seed=1), name="other")
    with pytest.raises(ValueError, match="made by a model other than other .*weights"):
        index_folder(tmp_path / "photos.index", photos, "other", other)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match="is the index of .*photos, not of .*elsewhere"):
        index_folder(tmp_path / "photos.index", tmp_path / "elsewhere", "tiny", encoder)
    with pytest.raises(NotADirectoryError, match="nowhere is not a folder"):
        index_folder(tmp_path / "new.index", tmp_path / "nowhere", "tiny", encoder)
    assert not (tmp_path / "new.index").exists()


def test_no_index_is_written_over_other_files(photos, tmp_path, encoder):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="with other files"):
        index_folder(tmp_path / "notes", photos, "tiny", encoder)
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["thesis.txt"]
    database = lancedb.connect(str(tmp_path / "database"))
    database.create_table("images", pa.table({"path": ["mine"]}))
    with pytest.raises(FileExistsError, match="with other files"):
        index_folder(tmp_path / "database", photos, "tiny", encoder)
    assert database.open_table("images").count_rows() == 1


def test_an_index_outlives_updates_of_the_libraries(run, photos, tmp_path):
    index, _ = run()
    settings = index.settings | {"identity": index.settings["identity"] | {"versions": {"pillow": "11.0.0"}}}
    (tmp_path / "photos.index/index.json").write_text(json.dumps(settings))
    assert run()[1].unchanged == 10


@pytest.mark.parametrize("missing", ["everything", "unreadable.lance", "tables"])
def test_a_run_that_was_killed_at_its_start(run, photos, tmp_path, missing):
    index, _ = run()
    if missing == "everything":
        (tmp_path / "photos.index/index.json").rename(tmp_path / "photos.index/index.json.tmp")
    for table in tmp_path.glob("photos.index/*.lance"):
        if missing != "unreadable.lance" or table.name == missing:
            shutil.rmtree(table)
    if missing != "everything":
        with pytest.raises(ValueError, match="has a table missing: repeat `proclip index`"):
            ImageIndex(tmp_path / "photos.index")
    assert run()[1].total == 10


def test_a_run_that_was_killed_at_its_end(run, monkeypatch, encoder):
    """All images are embedded, and their words have no index yet."""
    with monkeypatch.context() as patch:
        patch.setattr(ImageIndex, "__len__", lambda self: 0)
        index, _ = run()
    embedding = Question("a fox").embedding(encoder)
    with pytest.raises(ValueError, match="cannot be searched by words yet: repeat `proclip index`"):
        search(index, embedding, words="red")
    index, summary = run()
    assert summary.unchanged == 10
    assert "first/red.png" in [row["path"] for row in search(index, embedding, words="red")]
