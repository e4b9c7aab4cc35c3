"""The examples of at most 80 lines run on tiny models, as a newcomer would start them."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from tests.trainers.tiny_recipe import write_users_folder


EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ("finetune_on_folder", "swap_llm", "multilingual_search", "long_captions")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with `clip/`, `llm/`, the checkpoint `my-proclip/`, and `photos/` with a caption beside each image."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    write_users_folder(tmp_path)
    return tmp_path


def run(monkeypatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", SHORT)
def test_an_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 80


def test_finetune_on_folder(folder, monkeypatch, capsys):
    run(monkeypatch, "finetune_on_folder", "my-proclip", "photos", "tuned", "--epochs", "1", "--batch-size", "8")
    assert "i2t_r@1 of 2 held-out images: " in capsys.readouterr().out
    before, after = ProCLIPModel.from_pretrained("my-proclip"), ProCLIPModel.from_pretrained("tuned")
    changed = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert any(n.startswith("vision_model.") for n in changed) and any(n.startswith("text_adapter.") for n in changed)
    assert not any(n.startswith("text_model.") for n in changed)


def test_swap_llm(folder, monkeypatch, capsys):
    lines = [json.loads(line)["caption"] for line in Path("texts.jsonl").read_text().splitlines()]
    Path("captions.txt").write_text("\n".join([*lines, "", lines[0]]), encoding="utf-8")
    run(monkeypatch, "swap_llm", "clip", "llm", "captions.txt", "swapped", "--steps", "2", "--batch-size", "8")
    assert "% of 4 held-out captions are nearest to their own CLIP embedding" in capsys.readouterr().out
    model = ProCLIPModel.from_pretrained("swapped")
    assert model.config.lean and model.text_adapter.input_mean.any()
    clip = ProCLIPModel.from_vision_text_pretrained("clip", "llm")
    pixels = ProCLIPProcessor.from_pretrained("swapped")(images=Image.new("RGB", (9, 9)), return_tensors="pt")
    with torch.no_grad():
        embeds = [m.eval().get_image_features(**pixels).pooler_output for m in (model, clip)]
    assert torch.equal(*embeds)


def test_multilingual_search(folder, monkeypatch, capsys):
    with open("translations.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["en", "de"])
        writer.writerows([f"a drawing of {n} cats", f"eine Zeichnung von {n} Katzen"] for n in range(8))
    queries = ("eine Katze", "two cats")
    run(monkeypatch, "multilingual_search", "clip", "llm", "translations.csv", "photos", *queries, "--steps", "2")
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(":")[0] for line in lines] == list(queries)
    assert all(line.count("photos/") == 3 for line in lines)
    adapter = ProCLIPModel.from_pretrained("multilingual-output").text_adapter
    assert adapter.language_directions.any() and adapter.input_mean.any()


def test_long_captions(folder, monkeypatch, capsys):
    run(monkeypatch, "long_captions", "my-proclip", "photos", "--clip", "clip", "--lengths", "32", "64")
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.endswith("recall@1 of 24 images")
    assert [line.split(" tokens")[0] for line in lines] == ["clip, 48", "proclip, 32", "proclip, 64"]
    assert all(0 <= float(value.rstrip("%")) <= 100 for line in lines for value in line.split()[-2:])
