"""An index follows its folder: what is new, changed, moved, copied or deleted is found, and only new content is embedded."""

import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock
from PIL import Image, PngImagePlugin

from tests.trainers.tiny_encoders import tiny_proclip
from trainers.evaluation.scoring.encoders import Encoder
from trainers.search import build
from trainers.search.build import index_folder
from trainers.search.query import embed_image
from trainers.search.table import ImageIndex


@pytest.fixture
def run(photos, encoder, tmp_path):
    """Indexes the photos and returns the index and its summary."""
    return lambda **options: index_folder(tmp_path / "photos.index", photos, "tiny", encoder, **options)


def contents(index: ImageIndex) -> list[dict]:
    """All rows in the order of their paths, but for the signatures, which no other copy of the folder shares."""
    columns = ["path", "checksum", "width", "height", "taken", "caption", "words", "thumbnail", "embedding"]
    return sorted(index.rows(index.images, columns).to_pylist(), key=lambda row: row["path"])


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
    (photos / "._red.png").write_bytes(b"Mac OS X")
    (photos / "folder.png").mkdir()
    index, summary = run()
    paths = {row["path"] for row in contents(index)}
    assert {"one pixel.png", "quo'te; DROP TABLE images --.png"} <= paths and len(paths) == 12
    assert [path for path, _ in summary.unreadable] == [
        "bomb.png",
        "cut.png",
        "drawing.png",
        "empty.jpg",
        "page.jpg",
        "paper.jpg",
    ]
    assert all(reason for _, reason in summary.unreadable) and summary.num_links == 3
    # The second run knows them, and one that has become an image is taken in.
    Image.new("RGB", (9, 9), "lime").save(photos / "empty.jpg")
    (photos / "page.jpg").unlink()
    (photos / "quo'te; DROP TABLE images --.png").unlink()
    _, summary = run()
    assert (summary.total, summary.embedded, summary.removed, len(summary.unreadable)) == (12, 1, 1, 4)


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
    with pytest.raises(ValueError, match="made by another model than other .*weights"):
        index_folder(tmp_path / "photos.index", photos, "other", other)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match="is the index of .*photos, not of .*elsewhere"):
        index_folder(tmp_path / "photos.index", tmp_path / "elsewhere", "tiny", encoder)
    with pytest.raises(NotADirectoryError, match="nowhere is no folder"):
        index_folder(tmp_path / "new.index", tmp_path / "nowhere", "tiny", encoder)
    assert not (tmp_path / "new.index").exists()


def test_no_index_is_written_over_other_files(photos, tmp_path, encoder):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other files"):
        index_folder(tmp_path / "notes", photos, "tiny", encoder)
    assert (tmp_path / "notes/thesis.txt").read_text() == "years of work"


def test_one_writer_at_a_time(run, tmp_path):
    run()
    with (
        FileLock(tmp_path / "photos.index/index.lock"),
        pytest.raises(ValueError, match="is being written by another process"),
    ):
        run()


KILLED = """
import sys
from pathlib import Path
from tests.trainers.tiny_encoders import tiny_proclip
from trainers.evaluation.scoring.encoders import Encoder
from trainers.search import build
build.STEP_SIZE = 3
build.index_folder(Path(sys.argv[1]), Path(sys.argv[2]), "tiny", Encoder(*tiny_proclip(), name="tiny"), batch_size=1)
print("finished")
"""


def test_a_killed_run_is_finished_by_the_next(run, photos, tmp_path):
    for number in range(60):
        Image.new("RGB", (20, 20), (number, 2 * number, 255 - number)).save(photos / f"{number}.png")
    complete, _ = index_folder(tmp_path / "complete.index", photos, "tiny", Encoder(*tiny_proclip(), name="tiny"))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "photos.index"), str(photos)]
    images = tmp_path / "photos.index/images.lance/data"
    for steps in (1, 4, 9):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        while process.poll() is None and (not images.exists() or len(list(images.iterdir())) < steps):
            time.sleep(0.002)
        process.kill()
        process.communicate()
    assert len(ImageIndex(tmp_path / "photos.index")) < 70
    index, summary = run()
    assert summary.total == 70 and summary.embedded + summary.unchanged == 70 and summary.unchanged >= 3
    assert [row | {"embedding": None} for row in contents(index)] == [
        row | {"embedding": None} for row in contents(complete)
    ]
    mine, theirs = (torch.tensor([row["embedding"] for row in contents(one)]) for one in (index, complete))
    torch.testing.assert_close(mine, theirs)  # batches of another size round otherwise
