"""`proclip evaluate` as a program: processes, interruptions, tables, your own images, and wrong commands in one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hub_cards.measurements import read_measurements
from tests.trainers.evaluation.tiny_benchmarks import pictures, save, tiny_encoder, write_data
from tests.trainers.tiny_encoders import make_texts
from trainers.cli import app
from trainers.evaluation.results import read_results
from trainers.evaluation.scoring.encoders import Encoder


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def command(model: Path, suite: Path, output: Path, *options: str) -> list[str]:
    return ["evaluate", str(model), "--suite", str(suite), "--output-dir", str(output), "--device", "cpu", *options]


def scores(folder: Path) -> list:
    return [(task["metrics"], task["dataset"]["fingerprint"]) for task in read_results(folder)["tasks"]]


def test_two_processes_give_the_numbers_of_one(suite: Path, tmp_path):
    model = save(tiny_encoder("proclip"), tmp_path / "model")
    baseline = save(tiny_encoder("clip"), tmp_path / "clip")
    result = CliRunner().invoke(app, command(model, suite, tmp_path / "one", "--baseline", str(baseline)))
    assert result.exit_code == 0, result.output
    # What `accelerate launch` starts for several GPUs of a machine.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trainers.cli"]
    done = subprocess.run(
        [sys.executable, *launch, *command(model, suite, tmp_path / "two", "--baseline", str(baseline))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert scores(tmp_path / "two") == scores(tmp_path / "one")
    assert scores(tmp_path / "two" / "baseline") == scores(tmp_path / "one" / "baseline")
    writers = {path.name[:10] for path in (tmp_path / "two" / "features").glob("*/shard-*")}
    assert writers == {"shard-0000", "shard-0001"}, "both processes embedded something"
    assert done.stdout.count("results.json") == 1, "one of them printed"


def test_the_table_shows_the_difference_to_the_baseline(suite: Path, tmp_path):
    model, baseline = save(tiny_encoder("proclip"), tmp_path / "model"), save(tiny_encoder("clip"), tmp_path / "clip")
    result = CliRunner().invoke(app, command(model, suite, tmp_path / "out", "--baseline", str(baseline)))
    assert result.exit_code == 0, result.output
    ours, theirs = scores(tmp_path / "out")[1][0]["top1"], scores(tmp_path / "out" / "baseline")[1][0]["top1"]
    row = next(line for line in result.output.splitlines() if re.search(r"\bname\b.*top1", line))
    assert row.split()[2:] == [
        f"{100 * ours:.1f}",
        f"{100 * theirs:.1f}",
        f"{100 * (ours - theirs):+.1f}",
    ]


def test_smaller_embeddings_are_shown_with_what_they_lose(suite: Path, tmp_path):
    model = save(tiny_encoder("proclip"), tmp_path / "model")
    options = ["--truncate-dim", "8", "--precision", "binary"]
    result = CliRunner().invoke(app, command(model, suite, tmp_path / "out", *options))
    assert result.exit_code == 0, result.output
    task = read_results(tmp_path / "out")["tasks"][1]
    whole, ours = task["embedding"]["whole"]["metrics"]["top1"], task["metrics"]["top1"]
    row = next(line for line in result.output.splitlines() if re.search(r"\bname\b.*top1", line))
    assert row.split()[2:] == [f"{100 * ours:.1f}", f"{100 * whole:.1f}", f"{100 * (whole - ours):.1f}"]
    options = ["--truncate-dim", "17"]
    refused = CliRunner().invoke(app, command(model, suite, tmp_path / "refused", *options))
    assert refused.exit_code == 1
    assert "error: truncate_dim=17, but the embeddings of model have 16 dimensions" in refused.stderr


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path):
    # More texts than two shards have, one in a batch, so that there is time to kill it.
    texts = make_texts(1400, longest=12)
    rows = {"image": pictures(4), "captions": [texts[i::4] for i in range(4)]}
    features = datasets.Features(image=datasets.Image(), captions=datasets.List(datasets.Value("string")))
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")
    (tmp_path / "task.yaml").write_text(
        f"{{name: find, title: Find, kind: retrieval, group: own, data: {{source: {tmp_path / 'data.parquet'}}}, "
        "columns: {image: image, captions: captions}}"
    )
    model = save(tiny_encoder("clip"), tmp_path / "model")
    options = ["--token-budget", "1"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "trainers.cli", *command(model, tmp_path / "task.yaml", tmp_path / "killed", *options)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 100
    while len(list((tmp_path / "killed").glob("features/texts-*/shard-*.safetensors"))) < 1:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    # A second one may not write there meanwhile.
    refused = CliRunner().invoke(app, command(model, tmp_path / "task.yaml", tmp_path / "killed"))
    assert refused.exit_code == 1 and "error: another evaluation is writing to" in refused.output
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    (texts_cache,) = (tmp_path / "killed").glob("features/texts-*")
    left = len(list(texts_cache.glob("shard-*.safetensors")))
    assert 1 <= left < 3
    (texts_cache / "shard-0000-000099.safetensors.tmp").write_bytes(b"half of a shard")

    embedded = []
    encode = Encoder.encode_texts
    try:
        Encoder.encode_texts = lambda self, some, budget=None: (embedded.extend(some), encode(self, some, budget))[1]
        assert CliRunner().invoke(app, command(model, tmp_path / "task.yaml", tmp_path / "killed")).exit_code == 0
    finally:
        Encoder.encode_texts = encode
    assert len(embedded) == 1400 - 512 * left
    assert not list(texts_cache.glob("*.tmp"))
    assert CliRunner().invoke(app, command(model, tmp_path / "task.yaml", tmp_path / "whole")).exit_code == 0
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")


def test_the_dtype_is_said(suite: Path, tmp_path):
    """In the table, the results and the card's numbers: another dtype gives other scores."""
    model = save(tiny_encoder("proclip"), tmp_path / "model")
    for dtype, option in (
        ("float32", []),
        ("bfloat16", ["--model-dtype", "bfloat16", "--attn-implementation", "eager"]),
    ):
        result = CliRunner().invoke(app, command(model, suite, tmp_path / dtype, *option))
        assert result.exit_code == 0, result.output
        words = f"images in {dtype} and texts in {dtype}, on cpu"
        assert f"model: {words}" in result.output
        assert {measurement.precision for measurement in read_measurements(tmp_path / dtype)} == {words}
    result = CliRunner().invoke(
        app, command(model, suite, tmp_path / "x", "--attn-implementation", "flash_attention_2")
    )
    assert result.exit_code == 1 and "error: flash_attention_2 cannot be used" in result.output


def test_your_own_images_and_captions(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(pictures(4)):
        picture.save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "captions.csv").write_text(
        "file,text\n" + "".join(f'{i % 4}.png,"words, {t}"\n' for i, t in enumerate(make_texts(6)))
    )
    model = save(tiny_encoder("clip"), tmp_path / "model")
    options = ["--images", str(tmp_path / "pictures"), "--captions", str(tmp_path / "captions.csv"), "--device", "cpu"]
    options += ["--output-dir", str(tmp_path / "out")]

    def run(*more: str):
        return CliRunner().invoke(app, ["evaluate", str(model), *options, *more])

    result = run("--image-column", "file", "--caption-column", "text")
    assert result.exit_code == 0, result.output
    (task,) = read_results(tmp_path / "out")["tasks"]
    assert (task["name"], task["dataset"]["num_items"], task["protocol"]["num_captions"]) == ("pictures", 4, 6)
    for file in ("results.json", "report.html", "report.json"):  # for others to read
        assert str(tmp_path) not in (tmp_path / "out" / file).read_text(), file
    assert load_file(tmp_path / "out" / task["items_file"])["text_to_image"].tolist() == [0, 0, 1, 1, 2, 3]
    result = run()
    assert result.exit_code == 1 and "line 2 has no column 'image'; its columns are file, text" in result.output
    (tmp_path / "pictures" / "2.png").unlink()
    result = run("--image-column", "file", "--caption-column", "text")
    assert result.exit_code == 1 and "the image '2.png': there is no file" in result.output


def test_models_of_one_name_do_not_overwrite_each_other(tmp_path):
    (tmp_path / "images").mkdir()
    for i, image in enumerate(pictures(4)):
        image.save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(f"{i}.png,words {i}\n" for i in range(4)))
    models = []
    for number in range(4):
        encoder = tiny_encoder("clip")
        encoder.model.logit_scale.data += number
        models.append(str(save(encoder, tmp_path / str(number) / "model")))
    options = [
        "--baseline",
        models[1],
        "--also",
        models[2],
        "--also",
        models[3],
        "--output-dir",
        str(tmp_path / "out"),
    ]
    data = ["--images", str(tmp_path / "images"), "--captions", str(tmp_path / "captions.csv"), "--device", "cpu"]
    result = CliRunner().invoke(app, ["evaluate", models[0], *options, *data])
    assert result.exit_code == 0, result.output
    found = [read_results(folder)["model"] for folder in (tmp_path / "out/also").iterdir()]
    assert len({model["weights_sha256"] for model in found}) == 2 and {model["name"] for model in found} == {
        *models[2:]
    }
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert len({entry["name"] for entry in report["models"]}) == 3


def test_wrong_commands_are_refused_in_one_line(suite: Path, tmp_path):
    model = save(tiny_encoder("clip"), tmp_path / "model")

    def message(*arguments: str) -> str:
        result = CliRunner().invoke(
            app, ["evaluate", *arguments, "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
        )
        assert result.exit_code == 1 and "Traceback" not in result.output, result.output
        return result.output.strip().splitlines()[-1]

    assert "nothing to evaluate on: give --suite NAME" in message(str(model))
    assert "there is no suite 'retreival'; did you mean 'retrieval'?" in message(str(model), "--suite", "retreival")
    assert "--images and --captions belong together" in message(str(model), "--images", str(tmp_path))
    assert "--source takes NAME=PATH, got 'find'" in message(str(model), "--suite", str(suite), "--source", "find")
    wrong = message(str(model), "--suite", str(suite), "--source", "fnd=/tmp")
    assert "--source names 'fnd', which is not a benchmark of this suite" in wrong
    assert "find: there is no /nowhere" in message(str(model), "--suite", str(suite), "--source", "find=/nowhere")
    assert "several tasks are called 'find'" in message(str(model), "--suite", str(suite), "--suite", str(suite))
    assert "error: " in message(str(tmp_path / "nowhere"), "--suite", str(suite))
    os.remove(tmp_path / "model" / "processor_config.json")
    assert "error: " in message(str(model), "--suite", str(suite))
    listed = CliRunner().invoke(app, ["evaluate", "--list"])
    assert listed.exit_code == 0 and "zero-shot" in listed.output and "imagenet-sketch" in listed.output


def test_a_hub_source_that_cannot_be_reached_names_the_remedy(tmp_path):
    model = save(tiny_encoder("clip"), tmp_path / "model")
    result = CliRunner().invoke(app, command(model, "dtd", tmp_path / "out"), env={"HF_HUB_OFFLINE": "1"})
    assert result.exit_code == 1
    assert "mteb/dtd' on the Hub" in result.output and "--source dtd=PATH" in result.output
