"""What others do with a checkpoint: the pipelines of Transformers, from objects and from a folder."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from tests.modeling_proclip import tiny


PICTURES = [Image.new("RGB", (20, 16), colour) for colour in ("red", "green")]
LABELS = ["a red fox", "one", "two dogs"]


@pytest.fixture(scope="module")
def parts():
    return tiny.model(), tiny.processor(prompt_template=tiny.LLAMA3, max_length=40)


@pytest.fixture(scope="module", params=["objects", "folder"])
def make(request, parts, tmp_path_factory):
    """A function that makes the pipeline of a task."""
    model, processor = parts
    if request.param == "objects":
        return lambda task: pipeline(
            task, model=model, tokenizer=processor.tokenizer, image_processor=processor.image_processor
        )
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return lambda task: pipeline(task, model=str(folder))


def test_zero_shot_image_classification(make, parts):
    model, processor = parts
    results = make("zero-shot-image-classification")(PICTURES, candidate_labels=LABELS, hypothesis_template="{}")
    with torch.no_grad():
        expected = model(**processor(images=PICTURES, text=LABELS, return_tensors="pt")).logits_per_image.softmax(
            dim=1
        )
    for row, result in zip(expected, results, strict=True):
        scores = {entry["label"]: entry["score"] for entry in result}
        np.testing.assert_allclose([scores[label] for label in LABELS], row, atol=1e-5)


def test_image_feature_extraction(make, parts):
    model, processor = parts
    features = make("image-feature-extraction")(PICTURES, return_tensors=True)
    with torch.no_grad():
        expected = model(**processor(images=PICTURES, return_tensors="pt")).image_embeds
    for row, feature in zip(expected, features, strict=True):
        torch.testing.assert_close(feature, row[None])


def test_feature_extraction(make, parts):
    """Texts get the template from the tokenizer alone, and with `truncation=True` the processor's length."""
    model, processor = parts
    texts = [*LABELS, "long" * 100]
    features = make("feature-extraction")(texts, return_tensors=True, tokenize_kwargs={"truncation": True})
    with torch.no_grad():
        expected = model(**processor(text=texts, return_tensors="pt")).text_embeds
    for row, feature in zip(expected, features, strict=True):
        torch.testing.assert_close(feature, row[None], atol=1e-5, rtol=0)
