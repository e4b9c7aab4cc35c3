"""What the page answers, without the page."""

import shutil

import pytest
import torch

from tests.trainers.demo.conftest import LONG, make_galleries
from trainers.demo import gallery as gallery_module
from trainers.demo.answer import Answer, ask, render
from trainers.demo.gallery import Indexing


@pytest.fixture(scope="module")
def indexed(galleries):
    indexing = Indexing(galleries)
    indexing.start()
    indexing.wait()
    assert indexing.status == "ProCLIP: 10 images, 1 unreadable files · CLIP: 10 images, 1 unreadable files"
    assert not indexing.running
    return galleries


def embed(gallery, text):
    (batch,) = gallery.encoder.encode_texts([text])
    return gallery.encoder.project_texts(batch.embeddings)[0]


def test_what_is_crossed_out_changes_nothing_and_the_rest_does(indexed):
    proclip, clip = (ask(gallery, LONG, None, top=3) for gallery in indexed)
    assert (proclip.read, proclip.unread, proclip.max_length) == (LONG, "", 1024)
    assert clip.max_length == 48 and clip.read + clip.unread == LONG and clip.read and clip.unread
    assert torch.equal(embed(indexed[1], clip.read), embed(indexed[1], LONG))
    assert not torch.allclose(embed(indexed[1], clip.read[:-1]), embed(indexed[1], LONG))


@pytest.mark.parametrize("text", ["", "a fox", "狐狸"])
def test_short_texts_are_read_whole(indexed, text):
    answers = [ask(gallery, text, indexed[0].folder / "first/red.png", top=3) for gallery in indexed]
    assert [(found.read, found.unread) for found in answers] == [(text, "")] * 2


def test_results(indexed):
    photo = indexed[0].folder / "second/gray.png"
    answer = ask(indexed[0], "", photo, top=4)
    assert [row["path"] for row in answer.results][0] == "second/gray.png" and len(answer.results) == 4
    assert answer.results[0]["score"] == pytest.approx(1, abs=1e-4) and not answer.message
    both = ask(indexed[0], "a fox", photo, top=4)
    assert both.read == "a fox" and both.results[0]["score"] != answer.results[0]["score"]


def test_what_goes_wrong_is_said(indexed, tmp_path):
    page = tmp_path / "page.jpg"
    page.write_text("<html>")
    assert ask(indexed[0], "", page, 4).message == "not an image of a format that Pillow reads"
    (tmp_path / "empty").mkdir()
    (gallery, _) = make_galleries(tmp_path, tmp_path / "empty")
    assert ask(gallery, "a fox", None, 4).message == "There are no images in the index yet."
    indexing = Indexing([gallery])
    indexing.start()
    indexing.wait()
    assert indexing.status == "ProCLIP: 0 images"
    assert ask(gallery, "a fox", None, 4).message == "There are no images in the index yet."


def test_html_holds_no_markup_of_others(indexed):
    row = {"path": '"><script>alert(1)</script>\n.png', "caption": None, "thumbnail": b"\xff", "score": 0.5}
    html = render([Answer("<b>", "<i>read", "<u>unread", 7, [row]), Answer("x", message="<em>")])
    for tag in ("<script", "<b>", "<i>", "<u>", "<em>"):
        assert tag not in html
    assert r"\n.png" in html and "data:image/jpeg;base64,/w==" in html


def test_progress_and_errors_of_indexing(galleries, tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    shutil.copytree(galleries[0].folder, photos)
    indexing = Indexing(make_galleries(tmp_path, photos))
    seen = []
    index = gallery_module.index_folder

    def index_and_look(*arguments, on_step):
        index(*arguments, on_step=lambda done, total: (on_step(done, total), seen.append(indexing.status)))

    monkeypatch.setattr(gallery_module, "index_folder", index_and_look)
    indexing._run()
    assert seen == [f"{name}: {done} of 11 images indexed" for name in ("ProCLIP", "CLIP") for done in (0, 11)]
    shutil.rmtree(photos)
    indexing._run()
    assert indexing.status.startswith("Indexing stopped: ") and "is not a folder" in indexing.status
