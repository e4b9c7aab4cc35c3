"""Which retrieval examples are drawn, and what is shown of them."""

import base64
import io

import pytest
import torch
from PIL import Image

from trainers.evaluation.report.examples import Retrieved, retrieval_examples, thumbnail
from trainers.evaluation.scoring.metrics import retrieval_ranks


TEXT_TO_IMAGE = torch.arange(20).repeat_interleave(2)


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (300, 200), (10 * number, 0, 255 - 10 * number))


def number_of(uri: str) -> int:
    """Which `picture` a thumbnail shows."""
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert image.size == (112, 75) and image.format == "JPEG"
        return round(image.getpixel((50, 30))[0] / 10)


def retrieved(name: str, noise: float, seed: int) -> Retrieved:
    generator = torch.Generator().manual_seed(seed)
    images = torch.eye(20)
    texts = images[TEXT_TO_IMAGE] + noise * torch.randn(40, 20, generator=generator)
    return Retrieved(name, images, texts, retrieval_ranks(images, texts, TEXT_TO_IMAGE)[1])


@pytest.fixture
def models():
    return [retrieved("tuned", 0.5, 0), retrieved("base", 0.45, 1)]


def examples_of(models, seed=0):
    texts = [f"caption {number}" for number in range(40)]
    tuned, *rest = models
    return retrieval_examples("pictures", texts, TEXT_TO_IMAGE, [tuned], picture, seed, *rest)


def test_failures_come_first_and_every_image_is_the_right_one(models):
    examples = examples_of(models)
    assert [example["heading"] for example in examples] == (
        ["tuned misses what base finds"] * 3
        + ["tuned and base both miss"] * 2
        + ["tuned finds what base misses"] * 2
        + ["tuned and base both find"]
    )
    by_name = {entry.model: entry for entry in models}
    for example in examples:
        text = int(example["query"].split()[1])
        assert number_of(example["picture"]) == TEXT_TO_IMAGE[text]
        assert [found["model"] for found in example["found"]] == ["base", "tuned"]
        for found in example["found"]:
            entry = by_name[found["model"]]
            assert found["rank"] == entry.ranks[text]
            assert number_of(found["picture"]) == int((entry.image_embeds @ entry.text_embeds[text]).argmax())
    shown = [number_of(example["picture"]) for example in examples]
    assert len(set(shown)) == len(shown)


def test_without_a_baseline(models):
    examples = examples_of(models[:1])
    assert [example["heading"] for example in examples] == ["tuned misses"] * 5 + ["tuned finds"] * 2


def test_the_seed_draws(models):
    assert examples_of(models) == examples_of(models)
    assert [e["query"] for e in examples_of(models)] != [e["query"] for e in examples_of(models, seed=1)]


def test_a_tie_shows_the_other_image():
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    ranks = retrieval_ranks(images, texts, torch.arange(3))[1]
    examples = retrieval_examples(
        "ties", ["a", "b", "c"], torch.arange(3), [Retrieved("one", images, texts, ranks)], picture, 0
    )
    assert examples[0]["query"] == "a" and examples[0]["found"][0]["rank"] == 1
    assert number_of(examples[0]["found"][0]["picture"]) == 1


def test_small_and_transparent_images_stay_as_they_look():
    with Image.open(
        io.BytesIO(base64.b64decode(thumbnail(Image.new("RGBA", (20, 10), (0, 0, 0, 0))).partition(",")[2]))
    ) as image:
        assert image.size == (20, 10) and min(image.getpixel((5, 5))) > 250
