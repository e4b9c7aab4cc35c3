"""A damaged or hostile model's folder ends in one line that names it, soon."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from tests.modeling_proclip import tiny
from tests.trainers.tiny_encoders import tiny_clip
from trainers.cli import app
from trainers.evaluation.scoring.encoders import Encoder
from trainers.storage.model_files import loading_from
from trainers.text_store.encoding import load_encoder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    model, tokenizer = tiny_clip()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny.image_processor().save_pretrained(folder)
    return folder


def setting(part, key, value):
    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        (content if part is None else content[part])[key] = value
        (folder / "config.json").write_text(json.dumps(content))

    return change


DAMAGES = {
    "a billion layers": (
        setting("text_config", "num_hidden_layers", 10**9),
        "config.json: num_hidden_layers is 1000000000",
    ),
    "another type": (setting(None, "projection_dim", "wide"), "cannot be loaded: .*projection_dim"),
    "another shape": (setting("text_config", "vocab_size", 5), "cannot be loaded: its weights do not have the shapes"),
    "cut weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000]),
        "cannot be loaded: SafetensorError",
    ),
    "a broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "cannot be loaded: JSONDecodeError",
    ),
    "deep JSON": (
        lambda folder: (folder / "config.json").write_text('{"a":' + "[" * 100_000),
        "cannot be read as JSON",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named(sound, tmp_path, damage):
    change, message = DAMAGES[damage]
    folder = shutil.copytree(sound, tmp_path / "model")
    change(folder)
    for load in (load_encoder, Encoder.load):
        with pytest.raises((ValueError, OSError), match=message) as error:
            load(str(folder), "cpu")
        assert "model" in str(error.value)


def test_the_command_prints_one_line(sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "model")
    setting(None, "projection_dim", "wide")(folder)
    (tmp_path / "texts.txt").write_text("a\n")
    arguments = ["embed", tmp_path / "texts.txt", "--model", folder, "--output", tmp_path / "store", "--device", "cpu"]
    ended = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert ended.exit_code == 1
    assert ended.stderr.strip().splitlines()[-1].startswith(f"error: {folder} cannot be loaded: ")


def test_several_places_are_named_together(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="a with .*b cannot be loaded: KeyError: 'x'"):
        with loading_from((tmp_path / "a", None), (tmp_path / "b", None)):
            raise KeyError("x")
