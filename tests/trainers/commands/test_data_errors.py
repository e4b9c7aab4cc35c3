"""What is wrong with data ends each command in one line that names the file; what is right with it is found as the README writes it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import trainers
from tests.trainers.data.test_archives import pack, rows_of
from tests.trainers.tiny_pairs import picture
from trainers.cli import app


CLIP = Path(trainers.__file__).parent / "quickstart" / "assets" / "emoji-clip"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """`datasets` keeps what it copies in a folder of this test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def last_line(*arguments) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.output.strip().endswith(errors[0])
    return errors[0]


def damaged(folder: Path, kind: str) -> tuple[Path, str, str]:
    """A source of 8 rows, its column of texts, and the words that must be in the message."""
    rows = [{"image": f"{i}.png", "text": f"text {i}"} for i in range(8)]
    for i in range(8):
        picture(i).save(folder / f"{i}.png")
    if kind == "encoding":
        (folder / "latin.csv").write_bytes(
            b"image,text\n" + b"".join(b"%d.png,caf\xe9 %d\n" % (i, i) for i in range(8))
        )
        return folder / "latin.csv", "text", "latin.csv is not encoded as UTF-8: line 2, byte 10 is 0xE9"
    if kind == "cut":
        lines = "".join(json.dumps(row) + "\n" for row in rows[:7])
        (folder / "cut.jsonl").write_text(lines + '{"image": "7.png", "te')
        return folder / "cut.jsonl", "text", "cut.jsonl, line 8 is no JSON"
    if kind == "comma":
        (folder / "comma.csv").write_text("image,text\n0.png,a fox\n1.png,a cat, black\n")
        return folder / "comma.csv", "text", "comma.csv, line 3: 3 fields where the header names 2"
    pack(folder / "shards" / "0.tar", rows_of(*range(8)))
    (folder / "shards" / "1.tar").write_bytes((folder / "shards" / "0.tar").read_bytes()[:8192])
    return folder / "shards", "txt", "1.tar cannot be read to its end"


@pytest.mark.parametrize("kind", ["encoding", "cut", "comma", "shard"])
def test_a_damaged_file_is_named_by_every_command(tmp_path, kind):
    source, column, message = damaged(tmp_path, kind)
    image = "png" if kind == "shard" else "image"
    recipe = {
        "output_dir": str(tmp_path / "out"),
        "model": {"vision": str(CLIP), "text": str(CLIP)},
        "data": {"train": {"source": str(source), "image_column": image, "text_columns": column}},
        "stages": {"inheritance": {"global_batch_size": 4, "num_train_epochs": 1}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert message in last_line("train", tmp_path / "recipe.yaml", "--dry-run")
    store = ["--model", CLIP, "--output", tmp_path / "store", "--device", "cpu"]
    assert message in last_line("embed", source, "--column", column, *store)
    assert not (tmp_path / "store" / "store.json").exists()
    if kind == "shard":
        manifest = {
            "name": "m",
            "title": "m",
            "kind": "retrieval",
            "group": "own",
            "data": {"source": str(source), "split": "train"},
        }
        (tmp_path / "m.yaml").write_text(json.dumps({**manifest, "columns": {"image": image, "captions": column}}))
        data = ["--suite", tmp_path / "m.yaml"]
    else:
        data = ["--images", tmp_path, "--captions", source, "--caption-column", column]
    output = ["--output-dir", tmp_path / "evaluation", "--device", "cpu"]
    assert message in last_line("evaluate", CLIP, *data, *output)
    assert not (tmp_path / "evaluation" / "results.json").exists()


def test_the_readmes_own_evaluation(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        picture(40 * i).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "captions.csv").write_text("image,caption\n0.png,one\n1.png,two\n2.png,three\n")
    monkeypatch.chdir(tmp_path)
    arguments = ["evaluate", str(CLIP), "--images", "photos/", "--captions", "captions.csv", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (task,) = json.loads((tmp_path / "evaluation" / "results.json").read_text())["tasks"]
    assert (task["name"], task["dataset"]["num_items"], task["protocol"]["num_captions"]) == ("photos", 3, 3)


def test_the_name_of_a_benchmark_overwrites_nothing(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "model.safetensors").write_bytes(b"somebody's weights")
    manifest = {
        "name": "../../victim/model",
        "title": "m",
        "kind": "retrieval",
        "group": "own",
        "data": {"source": "x"},
    }
    (tmp_path / "m.yaml").write_text(json.dumps({**manifest, "columns": {"image": "image", "captions": "caption"}}))
    message = last_line("evaluate", CLIP, "--suite", tmp_path / "m.yaml", "--output-dir", tmp_path / "out" / "put")
    assert "m.yaml" in message and "name must be at most 100 letters" in message
    assert (tmp_path / "victim" / "model.safetensors").read_bytes() == b"somebody's weights"
