"""Every card is one that the Hub takes: those that are rendered, and those that lie in the packages."""

import re
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData, RepoCard, metadata_load

from hub_cards import check_card, converted_card, model_card, quickstart_card, text_store_card
from hub_cards.validity import check_metadata
from tests.hub_cards.test_quickstart_card import RESULTS
from tests.hub_server import hub_server
from tests.modeling_proclip import tiny
from trainers.data import TextEmbeddingStore


REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("modeling_proclip", "trainers", "hub_cards")
CARDS = sorted(file for package in PACKAGES for file in (REPOSITORY / package).rglob("README.md"))


@pytest.mark.parametrize("file", CARDS, ids=lambda file: str(file.relative_to(REPOSITORY).parent))
def test_cards_in_the_packages(file):
    assert metadata_load(file), "no metadata"
    check_card(RepoCard.load(file))
    for link in re.findall(r"\]\(((?!https?:|#)[^)\s]+)\)", file.read_text(encoding="utf-8")):
        assert (file.parent / link).exists(), f"{link} leads nowhere"


def test_there_are_cards_to_check():
    assert any("emoji-clip" in str(file) for file in CARDS)


def card(**metadata) -> ModelCard:
    return ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n# A card\n")


def result(**changes) -> EvalResult:
    fields = {"task_type": "t", "dataset_type": "d", "dataset_name": "D", "metric_type": "m", "metric_value": 0.5}
    return EvalResult(**{**fields, **changes})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"license": "Apache 2.0"}, "license 'Apache 2.0'"),
        ({"license": ["mit", "mine"]}, "license 'mine'"),
        ({"language": "English"}, "language 'English'"),
        ({"language": ["en", "de_DE"]}, "language 'de_DE'"),
        ({"base_model": "/home/me/model"}, "base_model '/home/me/model'"),
        ({"datasets": ["a/b/c"]}, "datasets 'a/b/c'"),
        ({"model_name": "m", "eval_results": [result(metric_value=float("nan"))]}, "not a finite number"),
        ({"model_name": "m", "eval_results": [result(metric_value="0.5 ± 0.1")]}, "not a finite number"),
        ({"model_name": "m", "eval_results": [result(), result(dataset_name="E")]}, "would merge them"),
    ],
)
def test_metadata_that_the_hub_would_refuse_or_change(metadata, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_metadata(ModelCardData(**metadata))


@pytest.mark.parametrize(
    "metadata",
    [
        {"license": "llama3.2", "language": ["en", "zh-Hant", "multilingual"], "base_model": ["a/b", "gpt2"]},
        {"model_name": "m", "eval_results": [result(), result(dataset_config="other"), result(metric_type="n")]},
        {"license": "other", "license_name": "my-terms", "license_link": "LICENSE"},
    ],
)
def test_good_metadata_passes(metadata):
    check_card(card(**metadata))


def test_the_hub_s_own_check_takes_every_kind_of_card(tmp_path, monkeypatch):
    """By `RepoCard.validate` of the real client, which asks the Hub."""
    model, processor = tiny.model(), tiny.processor(max_length=40)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    store = TextEmbeddingStore.build(["a text"], model, processor, tmp_path / "store", progress=False)
    cards = [
        quickstart_card(RESULTS),
        quickstart_card({**RESULTS, "llm": "gemma3"}),
        model_card(tmp_path / "model", license="mit", languages=["en"]),
        text_store_card(store),
        converted_card("owner/model", {"tower": "ViT"}, ["a note"]),
        *(RepoCard.load(file) for file in CARDS),
    ]
    with hub_server(tmp_path / "server") as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        for made in cards:
            made.validate(repo_type=made.repo_type or "model")
        assert hub.count("POST", "/api/validate-yaml") == len(cards)
        broken = RepoCard("---\nmodel-index: [{name: m, results: [{task: {}}]}]\n---\n")
        with pytest.raises(ValueError, match="invalid metadata"):
            broken.validate(repo_type="model")
