"""`proclip quickstart` as a newcomer runs it: the command in a process of its own, then what it leaves behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoProcessor

import modeling_proclip  # noqa: F401  registers the classes
from hub_cards import check_card
from tests.trainers.tiny_training import TinyStore
from trainers.data import TextEmbeddingStore, encode_texts
from trainers.evaluation import caption_retrieval
from trainers.openmoji.images import IMAGE_SIZE, LANGUAGES, PLACES, View, load_concepts, render
from trainers.openmoji.task import SIZES, ImageDataset, make_task
from trainers.quickstart.baseline import _was_trained, train_llm2clip
from trainers.quickstart.evaluate import embed_images, score
from trainers.quickstart.language_model import GEMMA3_TUNING_ADAPTER, TUNING_ADAPTER
from trainers.quickstart.run import Quickstart


def run_quickstart(output_dir, *arguments, **kwargs):
    command = [sys.executable, "-m", "trainers.cli", "quickstart", "--output-dir", str(output_dir), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "160"}, **kwargs)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A first run that was killed while the LLM embedded the texts, and then run again to the end."""
    output_dir = tmp_path_factory.mktemp("quickstart") / "out"
    command = [sys.executable, "-m", "trainers.cli", "quickstart", "--output-dir", str(output_dir), "--size", "small"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (output_dir / "text-store").is_dir():
        assert killed.poll() is None and time.monotonic() < deadline, "the text store never began"
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    completed = run_quickstart(output_dir, "--size", "small")
    assert completed.returncode == 0, completed.stderr
    return output_dir, completed


@pytest.fixture(scope="module")
def results(first_run):
    return json.loads((first_run[0] / "results.json").read_text())


def test_results_hold_every_row_and_number(results):
    assert [row["model"] for row in results["rows"]] == ["clip", "lit", "llm2clip", "proclip-stage1", "proclip"]
    assert (results["seed"], results["num_concepts"], results["num_seen"]) == (0, 80, 20)
    for row in results["rows"]:
        numbers = [row[key] for key in ("zero_shot_seen", "zero_shot_unseen", "i2t_r@1", "t2i_r@1")]
        assert set(row["zero_shot_by_language"]) == set(LANGUAGES)
        assert all(0 <= number <= 1 for number in [*numbers, *row["zero_shot_by_language"].values()])
        assert row["budget"]
    teacher, proclip = results["rows"][0], results["rows"][-1]
    assert teacher["zero_shot_unseen"] > 0.8
    # The small size trains for a minute: enough to be far from chance (1.25 %), not enough to reach the teacher.
    assert proclip["zero_shot_unseen"] > 0.1


def test_the_command_ends_with_the_table(first_run, results):
    assert "{" not in first_run[1].stdout  # no raw logs between the steps
    output = first_run[1].stdout
    for name in ("CLIP", "LiT", "LLM2CLIP", "ProCLIP, stage 1"):
        assert name in output
    assert f"{100 * results['rows'][-1]['zero_shot_unseen']:.1f}" in output
    assert "Traceback" not in first_run[1].stderr


def test_a_second_run_keeps_the_stores_and_prints_the_same_table(first_run, results):
    output_dir, _ = first_run
    shards = sorted((output_dir / "text-store").glob("*.safetensors"))
    before = [(shard.name, shard.stat().st_mtime_ns) for shard in shards]
    completed = run_quickstart(output_dir, "--size", "small")
    assert completed.returncode == 0, completed.stderr
    assert json.loads((output_dir / "results.json").read_text())["rows"] == results["rows"]
    assert [(shard.name, shard.stat().st_mtime_ns) for shard in shards] == before


def test_pictures_and_card_are_written(first_run, results):
    output_dir, _ = first_run
    for name in ("loss_curves.png", "languages.png", "retrieval.png"):
        with Image.open(output_dir / name) as picture:
            assert min(picture.size) > 200
    card = (output_dir / "proclip" / "README.md").read_text()
    assert f"{100 * results['rows'][-1]['zero_shot_unseen']:.1f}" in card
    assert not list(output_dir.glob("*.partial"))


def test_the_checkpoint_loads_whole_and_lean_with_equal_embeddings(first_run, tmp_path):
    output_dir, _ = first_run
    model = AutoModel.from_pretrained(output_dir / "proclip")
    processor = AutoProcessor.from_pretrained(output_dir / "proclip")
    concepts = load_concepts(80)
    view = View("white", "center", "large", False, (0.0, 0.0, 0.0))
    pictures = [render(concept, view) for concept in concepts[:6]]
    inputs = processor(text=[c.name for c in concepts[:6]], images=pictures, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    assert (outputs.logits_per_image.argmax(dim=1) == torch.arange(6)).sum() >= 3

    model.config.text_model_name_or_path = str(output_dir / "llm")
    model.save_pretrained(tmp_path / "lean", lean=True)
    assert sum(file.stat().st_size for file in (tmp_path / "lean").iterdir()) < 50e6
    with torch.no_grad():
        again = AutoModel.from_pretrained(tmp_path / "lean")(**inputs)
    torch.testing.assert_close(again.text_embeds, outputs.text_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(again.image_embeds, outputs.image_embeds, atol=1e-6, rtol=0)


def test_the_tuned_llm_has_its_own_folder_and_store_and_knows_other_languages(tmp_path):
    output_dir = tmp_path
    names = [name for concept in load_concepts(80)[:40] for name in (concept.name, concept.names["fr"])]
    runs, recall = {llm: Quickstart(output_dir, "small", 0, llm) for llm in ("plain", "tuned")}, {}
    for llm, run in runs.items():
        run.draw()
        run.pair_with_llm()
        embeds = torch.empty(len(names), 576)
        for batch in encode_texts(names, run.pair, run.processor):
            embeds[batch.indices] = batch.embeddings.float()
        recall[llm] = caption_retrieval(embeds[::2], embeds[1::2])["caption_r@1"]
    assert recall["tuned"] > recall["plain"] + 0.05
    assert {folder.name for folder in output_dir.glob("llm*")} == {"llm", "llm-tuned"}
    assert not AutoConfig.from_pretrained(output_dir / "llm-tuned").is_causal
    # A store of the one refuses the other.
    plain, tuned = runs["plain"], runs["tuned"]
    TextEmbeddingStore.build(names[:2], plain.pair, plain.processor, output_dir / "text-store")
    with pytest.raises(ValueError, match="a store of its own"):
        TextEmbeddingStore.build(names[:2], tuned.pair, tuned.processor, output_dir / "text-store")


def test_a_multilingual_llm_is_normalised_over_languages_and_pulled_to_the_texts_of_stage_1(tmp_path, monkeypatch):
    run = Quickstart(tmp_path, "small", 0)
    run.language_model = dataclasses.replace(run.language_model, multilingual=True)
    run.draw()
    run.pair_with_llm()
    asked = []

    def build(texts, model, processor, path, **settings):
        asked.append(set(texts))
        return TinyStore(576, len(asked), texts)

    monkeypatch.setattr(TextEmbeddingStore, "build", build)
    run.build_stores()
    names, adapter = run.task.parallel_names, run.pair.text_adapter
    assert {name for of_language in names.values() for name in of_language} <= asked[0]
    embeds = torch.stack([run.text_store.lookup(of_language) for of_language in names.values()]).double()
    torch.testing.assert_close(adapter.input_mean, embeds.mean((0, 1)).float(), atol=1e-5, rtol=0)
    assert adapter.language_directions.shape == (len(LANGUAGES) - 1, 576) and adapter.language_directions.any()
    texts = run.task.inheritance_texts
    torch.testing.assert_close(adapter.anchors, adapter.normalize(run.text_store.lookup(texts)))


@pytest.mark.parametrize(
    ("folder", "base", "num_linears", "most_bytes"),
    [
        (TUNING_ADAPTER, "HuggingFaceTB/SmolLM2-135M-Instruct", 12 * 7, 6e6),
        (GEMMA3_TUNING_ADAPTER, "google/gemma-3-270m", 18 * 7, 8e6),
    ],
)
def test_the_tuning_adapter_is_small_and_its_card_is_valid(folder, base, num_linears, most_bytes):
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_size < most_bytes
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.library_name) == (base, "peft")
    check_card(card)
    config = LoraConfig.from_pretrained(str(folder))
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (16, 32, card.data.base_model)
    with safe_open(weights, "pt") as tensors:
        names = list(tensors.keys())
        assert len(names) == 2 * num_linears
        assert all(tensors.get_tensor(name).abs().max() > 0 for name in names)


def test_llm2clips_checkpoint_is_the_one_that_was_scored(first_run, results):
    output_dir, _ = first_run
    checkpoint = train_llm2clip(output_dir, size="small")
    task = make_task(SIZES["small"], 0)
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    images = embed_images(model, ImageDataset(task, task.test, processor.image_processor).pixel_values)
    store = TextEmbeddingStore(output_dir / "text-store")

    def embed_texts(texts):
        with torch.inference_mode():
            return model.get_text_features(llm_embeds=store.lookup(texts)).pooler_output

    row = results["rows"][2]
    found = score(task, images, embed_texts)
    for key in ("zero_shot_seen", "zero_shot_unseen", "i2t_r@1", "t2i_r@1"):
        assert found[key] == pytest.approx(row[key], abs=0.02)
    before = (checkpoint / "model.safetensors").stat().st_mtime_ns
    assert train_llm2clip(output_dir, size="small") == checkpoint
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == before
    steps = SIZES["small"].baseline_steps
    assert [_was_trained(checkpoint, *wanted) for wanted in ((steps, 0), (steps, 1), (2 * steps, 0))] == [
        True,
        False,
        False,
    ]


def test_bad_arguments_are_one_line(tmp_path):
    for arguments, message in (
        (["--size", "huge"], "size"),
        (["--sizes", "small"], "No such option"),
    ):
        completed = run_quickstart(tmp_path, *arguments)
        assert completed.returncode != 0
        assert message in completed.stderr and "Traceback" not in completed.stderr


def test_the_task_follows_from_the_seed():
    one, two, other = (make_task(SIZES["small"], seed) for seed in (3, 3, 4))
    assert one == two and one.test != other.test
    assert {picture.concept for picture in one.alignment} == set(range(20))
    assert {picture.concept for picture in one.test} == set(range(80))
    texts = one.all_texts()
    assert len(texts) == len(set(texts))
    assert {picture.long for picture in one.retrieval} <= set(texts)
    assert not {picture.view for picture in one.test} & {picture.view for picture in one.alignment}


def test_drawings_are_where_the_view_says():
    concept = load_concepts(1)[0]
    for place, (px, py) in PLACES.items():
        picture = render(concept, View("white", place, "small", False, (0.0, 0.0, 0.0)))
        assert picture.size == (IMAGE_SIZE, IMAGE_SIZE) and picture.mode == "RGB"
        left, top, right, bottom = Image.eval(picture.convert("L"), lambda value: 255 - value).getbbox()
        assert abs((left + right) / 2 / IMAGE_SIZE - (0.25 + 0.5 * px)) < 0.2
        assert abs((top + bottom) / 2 / IMAGE_SIZE - (0.25 + 0.5 * py)) < 0.2
