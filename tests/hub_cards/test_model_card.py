"""The card of a checkpoint states what its folder and its results hold, and nothing else."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load
from PIL import Image

import modeling_proclip  # noqa: F401 - the card's snippets may leave the import out with remote code only
from hub_cards import model_card
from hub_cards.citations import CITATIONS
from hub_cards.model import PLACEHOLDER
from hub_cards.rendering import TEMPLATES
from modeling_proclip import ProCLIPModel
from tests.hub_cards.numbers import held, held_by_file, stated
from tests.modeling_proclip import tiny
from tests.trainers.tiny_training import inheritance_trainer, tiny_model, tuning_trainer
from trainers.evaluation.scoring.encoders import Encoder


RESULTS = {
    "format_version": 1,
    "model": {"name": "mine", "kind": "proclip"},
    "protocol": {},
    "versions": {"torch": "2.13.0"},
    "seed": 0,
    "tasks": [
        {
            "name": "Flickr30k",
            "kind": "retrieval",
            "group": "retrieval",
            "dataset": {"source": "owner/flickr30k", "revision": "abc", "split": "test", "num_items": 1000},
            "metric": "t2i_r@1",
            "value": 0.71234567,
            "metrics": {"t2i_r@1": 0.71234567, "i2t_r@1": 0.8123},
            "items_file": None,
            "seconds": 17.5,
        },
        {
            "name": "ImageNet-V2",
            "kind": "zero_shot",
            "group": "robustness",
            "dataset": {"source": "/data/imagenet-v2", "revision": None, "split": "test", "num_items": 10000},
            "metric": "top1",
            "value": 0.5,
            "metrics": {"top1": 0.5, "top5": 0.75},
            "items_file": None,
            "seconds": 99.25,
        },
    ],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint after both stages, as its trainer saved it."""
    folder = tmp_path_factory.mktemp("trained")
    model = tiny_model(load_text_model=True, text_model_name_or_path="owner/some-llm")
    inheritance_trainer(folder / "stage-1", model, max_steps=3).train()
    tuning_trainer(folder / "stage-2", model, max_steps=2, learning_rate=2e-3).train()
    model.save_pretrained(folder / "model")
    tiny.processor(prompt_template=tiny.LLAMA3, max_length=40).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def results(tmp_path) -> Path:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(RESULTS))
    return folder


def test_every_number_of_the_card_is_in_its_sources(trained, results):
    card = str(model_card(trained, results=[results]))
    sources = held(RESULTS)
    for name in ("config.json", "processor_config.json"):
        sources |= held_by_file(trained / name)
    model = ProCLIPModel.from_pretrained(trained)
    vision = sum(p.numel() for part in (model.vision_model, model.visual_projection) for p in part.parameters())
    sources |= {
        str(vision),
        *(str(sum(p.numel() for p in part.parameters())) for part in (model.text_model, model.text_adapter)),
    }
    sources.add(str((trained / "model.safetensors").stat().st_size))
    sources |= {"1", "2"}  # the stages of the training are counted
    literature = stated("\n".join(CITATIONS.values())) | {"2510.18795"}
    assert stated(card) <= sources | literature
    # The check would be empty if the results were not on the card.
    assert {"0.7123", "0.71234567", "0.8123", "0.7500", "1000", "10000"} <= stated(card)


def test_templates_state_no_number_of_their_own():
    ours = ("model_card.md", "adapter_card.md", "text_store_card.md", "parts/training.md", "parts/results.md")
    for template in (TEMPLATES / name for name in ours):
        static = re.sub(r"{{.*?}}|{%.*?%}|```.*?```", "", template.read_text(), flags=re.DOTALL)
        assert stated(static) <= {"2510.18795", "256"}, template.name  # and SHA-256


def test_the_record_of_both_stages_is_on_the_card(trained):
    card = model_card(trained).text
    assert "**representation inheritance** (`RepresentationInheritanceTrainer`): 3 steps of 6 rows" in card
    assert "**contrastive tuning** (`ContrastiveTuningTrainer`): 2 steps of 6 rows" in card
    assert "| `ema_decay` | 0.999 |" in card and "| `learning_rate` | 0.002 |" in card
    config = json.loads((trained / "config.json").read_text())
    final = config["training"][1]["final"]
    assert final["info_nce_loss"] > 0 and f"| `info_nce_loss`, last logged | {final['info_nce_loss']} |" in card


def test_shorter_embeddings_are_named(trained, tmp_path):
    assert "shorter embeddings" not in model_card(trained).text
    shutil.copytree(trained, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"matryoshka_dims": [5, 2]}))
    card = model_card(tmp_path / "model").text
    assert "|\n| shorter embeddings | trained for 5, 2 dimensions too: `truncate_dim` |\n| pooling |" in card


def test_results_become_the_model_index_of_the_hub(trained, results, tmp_path):
    file = tmp_path / "README.md"
    model_card(trained, repo_id="owner/mine", results=[results]).save(file)
    (index,) = metadata_load(file)["model-index"]
    assert index["name"] == "mine"
    flickr, imagenet = index["results"]
    assert flickr["task"]["type"] == "image-text-retrieval"
    assert flickr["dataset"] == {
        "name": "Flickr30k",
        "type": "owner/flickr30k",
        "config": "Flickr30k",
        "split": "test",
        "revision": "abc",
    }
    assert [metric["value"] for metric in flickr["metrics"]] == [0.71234567, 0.8123]
    assert [metric["type"] for metric in (*flickr["metrics"], *imagenet["metrics"])] == ["recall"] * 2 + [
        "accuracy"
    ] * 2
    assert imagenet["dataset"]["type"] == "imagenet-v2"  # and not where it lies on this machine
    assert len(ModelCard.load(file).data.eval_results) == 4


def test_what_was_not_measured_is_said(trained, results):
    assert "the results do not name the weights" in model_card(trained, results=[results]).text
    assert (
        "Not measured here: zero-shot classification; retrieval by long texts; languages"
        in model_card(trained, results=[results]).text
    )
    bare = model_card(trained)
    assert "No results were measured on these weights." in bare.text and "model-index" not in bare.data.to_dict()


def test_results_in_the_folder_are_found(trained, tmp_path):
    config = (trained / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(RESULTS))
    assert "| ImageNet-V2 | imagenet-v2 | test | 10000 | top1 0.5000, top5 0.7500 |" in model_card(tmp_path).text


def test_unknown_licences_are_said_to_be_unknown(trained):
    card = model_card(trained)
    assert card.data.license == "unknown"
    for line in (
        "this checkpoint | unknown",
        "image encoder | unknown",
        "LLM, owner/some-llm | unknown",
        "data | unknown",
    ):
        assert f"| {line} |" in card.text


def test_licences_and_languages_come_from_the_cards_of_the_base_models(trained, tmp_path):
    clip, llm, folder = tmp_path / "some-clip", tmp_path / "some-llm", tmp_path / "mine"
    for base, metadata in (
        (clip, "license: mit"),
        (llm, "license: other\nlicense_name: my-terms\nlanguage: [en, de]"),
    ):
        base.mkdir()
        (base / "README.md").write_text(f"---\n{metadata}\n---\n")
    folder.mkdir()
    config = json.loads((trained / "config.json").read_text())
    config |= {"vision_model_name_or_path": str(clip), "text_model_name_or_path": str(llm)}
    (folder / "config.json").write_text(json.dumps(config))
    card = model_card(folder, license="apache-2.0", datasets={"owner/pictures": "cc-by-4.0", "captions of mine": None})
    assert card.data.language == ["en", "de"] and card.data.license == "apache-2.0"
    assert "image encoder, some-clip | mit |" in card.text and "LLM, some-llm | my-terms |" in card.text
    assert "| data, owner/pictures | cc-by-4.0 |\n| data, captions of mine | unknown |" in card.text
    assert card.data.datasets == ["owner/pictures"] and card.data.base_model is None
    assert str(tmp_path) not in str(card)


def test_base_models_on_the_hub_are_in_the_metadata(trained):
    card = model_card(trained, base_models={"vision": "openai/clip-vit-base-patch32"})
    assert card.data.base_model == ["openai/clip-vit-base-patch32", "owner/some-llm"]
    assert yaml.safe_load(card.data.to_yaml())["pipeline_tag"] == "zero-shot-image-classification"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"license": "apache"}, "license 'apache' is none of the Hub's identifiers"),
        ({"languages": ["english"]}, "language 'english'"),
        ({"base_models": {"images": "a/b"}}, "base_models has no key 'images'"),
    ],
)
def test_what_the_hub_would_refuse_is_refused(trained, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model_card(trained, **arguments)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        model_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="'clip'"):
        model_card(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSON"),
        ("{}", 'neither "tasks" nor "rows"'),
        ('{"tasks": [{"name": "x"}]}', "tasks.0.kind: Field required"),
    ],
)
def test_damaged_results_are_named(trained, tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        model_card(trained, results=[tmp_path])
    assert "results.json" in str(error.value)


def test_a_number_that_is_none_is_refused(trained, tmp_path):
    task = {**RESULTS["tasks"][0], "value": float("nan"), "metrics": {}}
    (tmp_path / "results.json").write_text(json.dumps({**RESULTS, "tasks": [task]}))
    with pytest.raises(ValueError, match="tasks.0.value: Input should be a finite number"):
        model_card(trained, results=[tmp_path])


def test_the_snippets_of_a_full_card_run(tmp_path, monkeypatch, capsys):
    tiny.model().save_pretrained(tmp_path / "mine")
    tiny.processor(prompt_template=tiny.LLAMA3, max_length=40).save_pretrained(tmp_path / "mine")
    names = run_snippets(model_card(tmp_path / "mine"), tmp_path / "mine", monkeypatch)
    assert names["probabilities"].shape == (1, 2)
    assert "tensor([[" in capsys.readouterr().out


def test_the_snippets_of_a_lean_card_run(tmp_path, monkeypatch):
    """The LLM comes back from where the checkpoint names it."""
    model = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), tiny.LLAMA_DIR)
    model.save_pretrained(tmp_path / "mine", lean=True)
    tiny.processor(prompt_template=tiny.LLAMA3, max_length=40).save_pretrained(tmp_path / "mine")
    card = model_card(tmp_path / "mine")
    assert "files | lean: without the LLM" in card.text and f"fetches its LLM from {tiny.LLAMA_DIR.name}" in card.text
    assert run_snippets(card, tmp_path / "mine", monkeypatch)["probabilities"].shape == (1, 2)


def test_a_checkpoint_without_any_llm_shows_the_image_side_only(tmp_path, monkeypatch):
    tiny.model(text_model_name_or_path=None, lean=True).save_pretrained(tmp_path / "mine")
    tiny.image_processor().save_pretrained(tmp_path / "mine")
    card = model_card(tmp_path / "mine")
    assert "sentence_transformers" not in card.text and "pipeline(" not in card.text
    assert run_snippets(card, tmp_path / "mine", monkeypatch)["image_embeds"].shape == (1, 16)


def run_snippets(card: ModelCard, folder: Path, monkeypatch) -> dict:
    """What the card's Python blocks leave in their names, run one after the other."""
    monkeypatch.chdir(folder.parent)
    Image.new("RGB", (20, 16), "red").save("image.png")
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block.replace(PLACEHOLDER, str(folder)), names)
    return names


def evaluation_of(folder: Path, dtype: str, tmp_path: Path) -> Path:
    """Results that name the weights in `folder`, loaded as `proclip evaluate` loads them."""
    identity = Encoder.load(folder, "cpu", dtype).identity()
    output = tmp_path / f"evaluation-{dtype}"
    output.mkdir()
    (output / "results.json").write_text(json.dumps({**RESULTS, "model": identity}))
    return output


@pytest.mark.parametrize(("dtype", "lean"), [("auto", True), ("bfloat16", False)])
def test_results_are_held_against_the_weights(tmp_path, dtype, lean):
    model = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), tiny.LLAMA_DIR, adapter_input_norm="standardize")
    processor = tiny.processor(prompt_template=tiny.LLAMA3, max_length=40)
    for name, scale in (("mine", 1.0), ("other", 1.001)):
        with torch.no_grad():
            model.text_adapter.projection.weight *= scale
        model.save_pretrained(tmp_path / name, lean=lean)
        processor.save_pretrained(tmp_path / name)
    evaluation = evaluation_of(tmp_path / "mine", dtype, tmp_path)
    card = model_card(tmp_path / "mine", results=[evaluation]).text
    assert "0.7123" in card and "the results name their hash" in card
    with pytest.raises(ValueError, match="other weights"):
        model_card(tmp_path / "other", results=[evaluation])
    # Those that are found are shown only where they are of these weights: a folder can hold a baseline's too.
    for name, shown in (("mine", True), ("other", False)):
        shutil.copytree(evaluation, tmp_path / name / "evaluation")
        assert ("0.7123" in model_card(tmp_path / name).text) == shown


def test_drawn_rows_are_no_benchmark(trained, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({**RESULTS, "partial": {"limit": 10}}))
    card = model_card(trained, results=[tmp_path])
    assert "| 1000, drawn: no benchmark's number | t2i_r@1 0.7123" in card.text
    assert "model-index" not in card.data.to_dict()
