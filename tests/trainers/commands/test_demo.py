"""`proclip demo`, as a person starts it."""

import sys

import pytest
from typer.testing import CliRunner

from tests.trainers.search.conftest import write_photos
from tests.trainers.tiny_encoders import tiny_proclip
from trainers.cli import app
from trainers.demo import page


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder(here, monkeypatch):
    write_photos(here / "photos")
    for part in tiny_proclip():
        part.save_pretrained(here / "model")
    served = []
    monkeypatch.setattr(page, "serve", lambda galleries, *options, announce: served.append((galleries, *options)))
    result = CliRunner().invoke(app, ["demo", "photos", "--model", "model", "--port", "1234", "--top", "3"])
    assert result.exit_code == 0 and f"photos.index: index of {here / 'photos'}" in result.stdout, result.output
    ((galleries, *options),) = served
    assert [gallery.title for gallery in galleries] == ["model"] and options == ["127.0.0.1", 1234, 3, []]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no quickstart-output/results.json: run `proclip quickstart` first"),
        (("--model", "model"), "--model and --compare need an index or a folder"),
        (("nowhere",), "nowhere is not a folder"),
        ((".",), "give its model with --model"),
    ],
)
def test_refusals_are_one_line(arguments, message):
    result = CliRunner().invoke(app, ["demo", *arguments])
    *_, line = result.stderr.splitlines()
    assert result.exit_code == 1 and line.startswith("error: ") and message in line


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "trainers.demo.page")
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert 'install it by: pip install "proclip-transformers[demo]"' in result.stderr
