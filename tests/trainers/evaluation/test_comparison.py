"""What an evaluation does with several models: linear probe, CKA, examples, and a report of all of them."""

import copy
import io
import json

import datasets
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.trainers.tiny_encoders import tiny_proclip
from trainers.cli import app
from trainers.evaluation.data.manifest import load_suite, parse_manifest
from trainers.evaluation.report import write_report
from trainers.evaluation.runner import evaluate
from trainers.evaluation.scoring.cka import cka_by_layer
from trainers.evaluation.scoring.encoders import Encoder
from trainers.evaluation.scoring.linear_probe import linear_probe


pytest.importorskip("sklearn")

COLORS = ["red", "green", "blue", "white"]


def png(color: str, number: int) -> dict:
    """A picture of mostly one colour; no two are alike."""
    image = Image.new("RGB", (8, 8), color)
    image.putpixel((number % 8, number // 8 % 8), (number, 90, 255 - number))
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A suite of all kinds that the report shows, on pictures of four colours."""
    folder = tmp_path_factory.mktemp("data")
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "caption": datasets.Value("string"),
            "label": datasets.ClassLabel(names=COLORS),
        }
    )
    sizes = {"train": 40, "test": 32}
    for start, (split, count) in zip((0, 100), sizes.items(), strict=True):
        rows = [
            {"image": png(COLORS[i % 4], start + i), "caption": f"{COLORS[i % 4]} with {i}", "label": i % 4}
            for i in range(count)
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    test = {"source": str(folder / "test.parquet"), "split": "train", "num_items": 32}
    train = {"source": str(folder / "train.parquet"), "split": "train", "num_items": 40}
    classes = {"count": 4, "names": "feature"}
    labelled = {"image": "image", "label": "label"}
    contents = [
        {"name": "colors", "title": "Colours", "kind": "zero_shot", "group": "classification", "data": test}
        | {"columns": labelled, "classes": classes, "prompts": ["{}", "a {} one"]},
        {"name": "captions", "title": "Captions", "kind": "retrieval", "group": "retrieval", "data": test}
        | {"columns": {"image": "image", "captions": "caption"}},
        {"name": "probe", "title": "Probe", "kind": "linear_probe", "group": "linear_probe", "data": test}
        | {"train": train, "columns": labelled, "classes": classes},
        {
            "name": "layers",
            "title": "Layers",
            "kind": "cka",
            "group": "cka",
            "data": test,
            "columns": {"image": "image"},
        },
    ]
    return [manifest for content in contents for manifest in parse_manifest(content, "test")]


@pytest.fixture(scope="module")
def encoders():
    """A model, its baseline, and another model: the image encoders differ a little and a lot."""
    model, processor = tiny_proclip()
    models = {"tuned": copy.deepcopy(model), "base": model, "other": copy.deepcopy(model)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, strength in (("tuned", 0.02), ("other", 0.5)):
            for weight in models[name].vision_model.parameters():
                weight.add_(strength * torch.randn(weight.shape, generator=generator))
    return [Encoder(some, processor, name) for name, some in models.items()]


@pytest.fixture(scope="module")
def run(suite, encoders, tmp_path_factory):
    """The folder of an evaluation of all three."""
    folder = tmp_path_factory.mktemp("run")
    evaluate(encoders, suite, folder, progress=False)
    return folder


def results_of(folder) -> dict:
    content = json.loads((folder / "results.json").read_text())
    return {task["name"]: task for task in content["tasks"]}


def read(file: str) -> datasets.Dataset:
    return datasets.Dataset.from_parquet(file).cast_column("image", datasets.Image())


def pixels(encoder: Encoder, suite) -> torch.Tensor:
    rows = read(suite[0].data.source)
    return encoder.prepare_images([row["image"] for row in rows])["pixel_values"]


def test_linear_probe_is_that_of_the_embeddings(run, suite, encoders):
    rows = {name: read(data.source) for name, data in (("train", suite[2].train), ("test", suite[2].data))}
    embeds = {
        name: encoders[0].encode_images(encoders[0].prepare_images([row["image"] for row in some]))
        for name, some in rows.items()
    }
    labels = {name: torch.tensor(some["label"]) for name, some in rows.items()}
    expected = linear_probe(embeds["train"], labels["train"], embeds["test"], labels["test"])
    found = results_of(run)["probe"]
    assert found["metrics"] == {"accuracy": expected.accuracy, "mean_per_class": expected.mean_per_class}
    assert found["dataset"]["num_items"] == 32 and found["protocol"]["num_train"] == 40
    assert expected.accuracy > 0.9  # four colours are easy: the rows of train and test are where they belong


def test_cka_is_measured_against_the_baseline_and_not_for_it(run, suite, encoders):
    found = results_of(run)["layers"]
    both = pixels(encoders[0], suite), pixels(encoders[1], suite)
    expected = cka_by_layer(encoders[0].model, encoders[1].model, [both])
    assert [row["layer"] for row in found["layers"]] == ["patches", "1", "embedding"]
    for row, other in zip(found["layers"], expected, strict=True):
        assert row["cka_debiased"] == pytest.approx(other["cka_debiased"], abs=1e-5)
    assert found["value"] == found["layers"][-1]["cka_debiased"] and found["items_file"] is None
    assert results_of(run / "also" / "other")["layers"]["value"] < found["value"]
    assert "layers" not in results_of(run / "baseline")


def test_cka_without_a_baseline_is_left_out_with_a_word(suite, encoders, tmp_path, caplog):
    (results,) = evaluate(encoders[:1], suite, tmp_path, progress=False)
    assert [task["name"] for task in results["tasks"]] == ["colors", "captions", "probe"]
    assert "layers is left out: CKA compares with a baseline" in caplog.text


def test_examples_show_all_models(run):
    examples = json.loads((run / "examples.json").read_text())
    assert examples and {example["task"] for example in examples} == {"captions"}
    for example in examples:
        assert [found["model"] for found in example["found"]] == ["base", "tuned", "other"]


def test_the_report_compares_both_models_with_the_baseline(run):
    pytest.importorskip("matplotlib")
    page = write_report(run).read_text(encoding="utf-8")
    report = json.loads((run / "report.json").read_text())
    assert report["baseline"] == "base" and [model["name"] for model in report["models"]] == ["tuned", "other"]
    assert set(report["cka"]) == {"tuned", "other"} and report["not_measured"]
    assert page.count("data:image/jpeg") >= 4
    assert {entry["task"] for entry in report["confusions"]} == {"colors"}


def test_a_run_of_cka_alone_has_a_report_without_a_verdict(suite, encoders, tmp_path):
    pytest.importorskip("matplotlib")
    evaluate(encoders[:2], suite[3:], tmp_path, progress=False)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "The image encoder, layer by layer" in page and "What changed" not in page


def test_models_of_one_name_are_told_before_any_work(suite, encoders, tmp_path):
    with pytest.raises(ValueError, match="need different names, but these are called base, base, tuned"):
        evaluate([encoders[1], encoders[1], encoders[0]], suite, tmp_path)


def test_other_models_need_a_baseline_on_the_command_line():
    done = CliRunner().invoke(app, ["evaluate", "a", "--suite", "quickstart", "--also", "b"])
    assert done.exit_code == 1 and "--also needs --baseline" in done.stderr


def test_too_few_images_for_cka_name_the_benchmark(suite, encoders, tmp_path):
    with pytest.raises(ValueError, match="benchmark layers: CKA needs at least 4 images, and has 3"):
        evaluate(encoders[:2], suite[3:], tmp_path, limit=3, progress=False)


def test_manifests_of_probes_are_checked():
    content = {
        "name": "a",
        "title": "A",
        "kind": "linear_probe",
        "group": "linear_probe",
        "data": {"source": "somewhere"},
        "columns": {"image": "image", "label": "label"},
        "classes": {"count": 2, "names": "feature"},
    }
    with pytest.raises(ValueError, match="train belongs to linear_probe, which needs it"):
        parse_manifest(content, "a.yaml")
    with pytest.raises(ValueError, match="a.yaml: train.source: is missing"):
        parse_manifest(content | {"train": {}}, "a.yaml")
    with pytest.raises(ValueError, match="linear_probe has no prompts"):
        parse_manifest(content | {"train": {"source": "b"}, "prompts": ["a {}"]}, "a.yaml")
    with pytest.raises(ValueError, match="classes belong to zero_shot and linear_probe"):
        parse_manifest({**content, "kind": "cka", "columns": {"image": "image"}}, "a.yaml")


def test_the_quickstarts_suite_has_everything_that_the_report_shows():
    tasks = load_suite("quickstart").tasks
    assert {task.kind for task in tasks} == {"zero_shot", "retrieval", "linear_probe", "cka"}
    assert {task.group for task in tasks} == {"classification", "retrieval", "multilingual", "linear_probe", "cka"}
