"""The metrics as modules of `evaluate`: the numbers of the pure functions, and cards whose examples are true."""

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import trainers.evaluation
from tests.golden import load
from trainers.evaluation import retrieval_recall, zero_shot_accuracy


evaluate = pytest.importorskip("evaluate")

MODULES = Path(trainers.evaluation.__file__).parent / "modules"
NAMES = ("retrieval_recall", "zero_shot_accuracy")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is left in the person's cache."""
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))


def test_recall_is_that_of_the_function_on_the_reference_case():
    golden = load("g7_retrieval_5caps")
    images, texts, index = (golden.inputs[name] for name in ("image_embeds", "text_embeds", "text_image_index"))
    module = evaluate.load(str(MODULES / "retrieval_recall"))
    found = module.compute(predictions=texts, references=index, image_embeddings=images)
    assert found == retrieval_recall(images, texts, index)
    assert found["i2t_r@1"] == 0.51
    # In batches, as arrays, in bfloat16.
    for start in range(0, len(texts), 300):
        module.add_batch(predictions=texts[start : start + 300].numpy(), references=index[start : start + 300].numpy())
    assert module.compute(image_embeddings=images.numpy()) == found
    rough = module.compute(predictions=texts.bfloat16().float().tolist(), references=index, image_embeddings=images)
    assert rough == retrieval_recall(images, texts.bfloat16(), index)


def test_zero_shot_accuracy_is_that_of_the_function():
    generator = torch.Generator().manual_seed(0)
    images, classes = torch.randn(60, 8, generator=generator), torch.randn(5, 8, generator=generator)
    labels = torch.arange(60) ** 2 % 5  # classes 2 and 3 have no pictures, 0 has fewer than 1 and 4
    module = evaluate.load(str(MODULES / "zero_shot_accuracy"))
    found = module.compute(predictions=images, references=labels, class_embeddings=classes, ks=[1, 3])
    mean = found.pop("mean_per_class")
    assert found == zero_shot_accuracy(images, classes, labels, ks=(1, 3))
    units = torch.nn.functional.normalize(classes.double(), dim=-1)
    right = ((images.double() @ units.T).argmax(1) == labels).numpy()
    expected = np.mean([right[labels.numpy() == label].mean() for label in (0, 1, 4)])
    assert mean == pytest.approx(expected) and mean != found["top1"]


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_the_cards_are_true(name):
    found = doctest.testfile(str(MODULES / name / "README.md"), module_relative=False)
    assert found.attempted >= 5 and found.failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_cards_have_what_the_hub_and_a_reader_need(name):
    card = (MODULES / name / "README.md").read_text(encoding="utf-8")
    _, metadata, text = card.split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert {"title", "emoji", "colorFrom", "colorTo", "sdk", "pinned", "tags", "description"} <= set(metadata)
    assert metadata["tags"][:2] == ["evaluate", "metric"]
    sections = [line.strip("# ") for line in text.splitlines() if line.startswith("## ")]
    assert sections == [
        "Metric description",
        "How to use",
        "Limitations and bias",
        "Citation",
        "Further references",
    ]
    module = evaluate.load(str(MODULES / name))
    assert metadata["description"].strip() == module.description
    # One citation in both, so that they cannot drift apart.
    assert module.citation.strip() in text


def test_bad_input_is_refused():
    recall = evaluate.load(str(MODULES / "retrieval_recall"))
    with pytest.raises(ValueError, match="needs image_embeddings"):
        recall.compute(predictions=[[1.0, 0.0]], references=[0])
    with pytest.raises(ValueError, match="text_embeds has NaN or infinite values, first in row 1"):
        recall.compute(predictions=[[1.0, 0.0], [float("nan"), 1.0]], references=[0, 0], image_embeddings=[[1.0, 0.0]])
    with pytest.raises(ValueError, match="1 of 2 images have no caption"):
        recall.compute(predictions=[[1.0, 0.0]], references=[0], image_embeddings=[[1.0, 0.0], [0.0, 1.0]])
    accuracy = evaluate.load(str(MODULES / "zero_shot_accuracy"))
    with pytest.raises(ValueError, match="needs class_embeddings"):
        accuracy.compute(predictions=[[1.0, 0.0]], references=[0])
    with pytest.raises(ValueError, match=r"labels\[0\] is 3, but the 1 classes go from 0 to 0"):
        accuracy.compute(predictions=[[1.0, 0.0]], references=[3], class_embeddings=[[1.0, 0.0]])
