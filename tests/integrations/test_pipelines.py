"""What others do with a checkpoint: the pipelines of Transformers, from objects and from a folder, give the model's own numbers."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from modeling_proclip import ProCLIPModel
from tests.modeling_proclip import tiny


PICTURES = [
    Image.new("RGB", size, colour) for size, colour in (((20, 16), "red"), ((16, 30), "green"), ((9, 9), "blue"))
]
LABELS = ["a red fox", "one", "two dogs in the grass"]
LONG = "long " * 100  # beyond max_length


@pytest.fixture(scope="module")
def parts():
    model = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), tiny.LLAMA_DIR)
    return model, tiny.processor(prompt_template=tiny.LLAMA3, max_length=40)


@pytest.fixture(scope="module", params=["objects", "folder", "lean folder"])
def make(request, parts, tmp_path_factory):
    """A function that makes the pipeline of a task."""
    model, processor = parts
    if request.param == "objects":
        return lambda task, dtype=None: pipeline(
            task,
            model=model if dtype is None else copy.deepcopy(model).to(dtype),
            tokenizer=processor.tokenizer,
            image_processor=processor.image_processor,
        )
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder, lean=request.param == "lean folder")
    processor.save_pretrained(folder)
    return lambda task, **kwargs: pipeline(task, model=str(folder), **kwargs)


@torch.no_grad()
def probabilities(parts, pictures: list, labels: list[str], **kwargs) -> np.ndarray:
    """`(len(pictures), len(labels))` by the model itself."""
    model, processor = parts
    inputs = processor(images=pictures, text=labels, return_tensors="pt", **kwargs)
    return model(**inputs).logits_per_image.softmax(dim=1).numpy()


def scores(results: list[list[dict]], labels: list[str]) -> np.ndarray:
    by_label = [{entry["label"]: entry["score"] for entry in result} for result in results]
    return np.array([[row[label] for label in labels] for row in by_label])


@torch.no_grad()
def text_embeds(parts, texts: list[str], **kwargs) -> torch.Tensor:
    model, processor = parts
    return model(**processor(text=texts, return_tensors="pt", **kwargs)).text_embeds


@torch.no_grad()
def image_embeds(parts, pictures: list) -> torch.Tensor:
    model, processor = parts
    return model(**processor(images=pictures, return_tensors="pt")).image_embeds


def assert_rows_close(features: list[torch.Tensor], expected: torch.Tensor, atol: float = 1e-5) -> None:
    """Each feature is `(1, projection_dim)`: one embedding of unit length, not one a token or patch."""
    for feature, row in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, row[None], atol=atol, rtol=0)
        torch.testing.assert_close(feature.norm(), torch.tensor(1.0))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_zero_shot_image_classification(make, parts, batch_size):
    classify = make("zero-shot-image-classification")
    results = classify(PICTURES, candidate_labels=LABELS, hypothesis_template="{}", batch_size=batch_size)
    np.testing.assert_allclose(scores(results, LABELS), probabilities(parts, PICTURES, LABELS), atol=1e-5)


def test_zero_shot_image_classification_by_its_own_hypothesis(make, parts):
    results = make("zero-shot-image-classification")(PICTURES, candidate_labels=LABELS)
    prompts = [f"This is a photo of {label}." for label in LABELS]
    np.testing.assert_allclose(scores(results, LABELS), probabilities(parts, PICTURES, prompts), atol=1e-5)


def test_zero_shot_image_classification_reads_long_labels_to_their_end(make, parts):
    """The pipeline has no way to truncate labels, so they are read whole; the processor cuts them at `max_length`."""
    labels = ["a red fox", LONG.strip()]
    results = make("zero-shot-image-classification")(PICTURES, candidate_labels=labels, hypothesis_template="{}")
    whole = probabilities(parts, PICTURES, labels, truncation=False)
    np.testing.assert_allclose(scores(results, labels), whole, atol=1e-5)
    assert np.abs(whole - probabilities(parts, PICTURES, labels)).max() > 1e-4


@pytest.mark.parametrize("batch_size", [1, 2])
def test_image_feature_extraction(make, parts, batch_size, tmp_path):
    files = [str(tmp_path / f"{number}.png") for number in range(len(PICTURES))]
    for picture, file in zip(PICTURES, files, strict=True):
        picture.save(file)
    extract = make("image-feature-extraction")
    for pictures in (PICTURES, files):
        features = extract(pictures, return_tensors=True, batch_size=batch_size)
        assert_rows_close(features, image_embeds(parts, PICTURES))
    (values,) = extract(PICTURES[0])  # plain lists by default
    np.testing.assert_allclose(values, image_embeds(parts, PICTURES[:1])[0], atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_feature_extraction(make, parts, batch_size):
    """Texts get the template from the tokenizer alone, and with `truncation=True` the processor's length."""
    texts = [*LABELS, LONG.strip()]
    extract = make("feature-extraction")
    features = extract(texts, return_tensors=True, truncation=True, batch_size=batch_size)
    assert_rows_close(features, text_embeds(parts, texts))
    whole = extract(texts, return_tensors=True, batch_size=batch_size)
    assert_rows_close(whole, text_embeds(parts, texts, truncation=False))
    assert (whole[-1] - features[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("task", ["feature-extraction", "image-feature-extraction"])
def test_half_precision(make, parts, task):
    extract = make(task, dtype=torch.bfloat16)
    assert extract.model.dtype == torch.bfloat16
    given, expected = (LABELS, text_embeds) if task == "feature-extraction" else (PICTURES, image_embeds)
    features = torch.cat(extract(given, return_tensors=True))
    assert (features * expected(parts, given)).sum(dim=1).min() > 0.99


def test_pipelines_drop_transparency(make, parts):
    """They convert every picture to RGB before any image processor sees it; the processor itself puts it on white."""
    picture = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    (feature,) = make("image-feature-extraction")([picture], return_tensors=True)
    assert_rows_close([feature], image_embeds(parts, [picture.convert("RGB")]))
    assert (feature - image_embeds(parts, [picture])).abs().max() > 1e-3
    # The remedy: give the pipeline what the processor sees.
    white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    (feature,) = make("image-feature-extraction")([white], return_tensors=True)
    assert_rows_close([feature], image_embeds(parts, [picture]))


def test_a_camera_s_rotation_is_undone(make, parts, tmp_path):
    picture = Image.fromarray(np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "rotated.png"
    picture.save(file, exif=exif)
    (feature,) = make("image-feature-extraction")([str(file)], return_tensors=True)
    assert_rows_close([feature], image_embeds(parts, [str(file)]))
    assert (feature - image_embeds(parts, [picture])).abs().max() > 1e-4
