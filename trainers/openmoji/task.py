"""What the quickstart trains and tests on: images and captions drawn from the emoji world by one seed."""

import random
from dataclasses import dataclass

import torch
from PIL import Image
from torch.utils.data import Dataset

from .held_out import HeldOutNames
from .images import (
    LANGUAGES,
    ZERO_SHOT_TEMPLATES,
    Concept,
    View,
    load_concepts,
    long_caption,
    random_view,
    render,
    short_caption,
)
from .translated_captions import translated_caption


@dataclass(frozen=True)
class Size:
    """How much of everything; `full` fits in eight minutes on two cores."""

    concepts: int
    seen: int  # concepts whose images the alignment sees
    alignment_views: int  # images of each seen concept
    test_views: int  # images of each concept to classify, the first two also to retrieve
    language_concepts: int  # concepts that every language names
    inheritance_steps: int
    tuning_steps: int
    baseline_steps: int


SIZES = {
    "small": Size(80, 20, 8, 2, 20, 60, 10, 20),
    "full": Size(600, 150, 8, 4, 150, 1000, 150, 300),
}


@dataclass(frozen=True)
class TaskImage:
    """An image and how it is described."""

    concept: int
    view: View
    short: str
    long: str


@dataclass(frozen=True)
class Task:
    """Concepts, the images to align on (seen concepts only), the images to test on (all), and every text that is read."""

    size: Size
    concepts: tuple[Concept, ...]
    alignment: list[TaskImage]
    test: list[TaskImage]
    inheritance_texts: list[str]

    @property
    def retrieval(self) -> list[TaskImage]:
        return self.test[: 2 * len(self.concepts)]

    @property
    def language_concepts(self) -> list[int]:
        """Spread evenly over seen and unseen concepts."""
        stride = len(self.concepts) // self.size.language_concepts
        return list(range(0, len(self.concepts), stride))[: self.size.language_concepts]

    @property
    def example_queries(self) -> list[int]:
        """Five captions of unseen concepts to show, as the seed drew them and none picked: indices in `retrieval`."""
        stride = (len(self.concepts) - self.size.seen) // 5
        return [self.size.seen + stride * i for i in range(5)]

    @property
    def parallel_names(self) -> dict[str, list[str]]:
        """Language -> names of other concepts, in the same order for every language, none of which holds a held-out name."""
        held_out = HeldOutNames([self.concepts[i] for i in self.language_concepts], LANGUAGES)
        others = [c for c in self.concepts if not any(held_out.in_text(name) for name in c.names.values())]
        return {language: [concept.names[language] for concept in others] for language in LANGUAGES}

    @property
    def language_retrieval(self) -> list[TaskImage]:
        """The images of `retrieval` that show a concept by which languages are compared."""
        held_out = set(self.language_concepts)
        return [image for image in self.retrieval if image.concept in held_out]

    def class_prompts(self, language: str, indices: list[int]) -> list[list[str]]:
        """The prompts of each concept: the ensemble in English, the bare name in the other languages."""
        templates = ZERO_SHOT_TEMPLATES if language == "en" else ("{}",)
        return [[template.format(self.concepts[i].names[language]) for template in templates] for i in indices]

    def long_captions(self, images: list[TaskImage], language: str) -> list[str]:
        """The long captions of `images` in English or a language of `PHRASES`."""
        if language == "en":
            return [image.long for image in images]
        return [translated_caption(self.concepts[image.concept], image.view, language) for image in images]

    @property
    def training_texts(self) -> list[str]:
        """Every text that stage 1 or 2 trains on, without repeats."""
        captions = [caption for image in self.alignment for caption in (image.short, image.long)]
        return list(dict.fromkeys([*self.inheritance_texts, *captions]))

    def all_texts(self) -> list[str]:
        """Every text that training or testing looks up, without repeats, in a fixed order."""
        texts = list(self.inheritance_texts)
        texts += [caption for image in self.alignment for caption in (image.short, image.long)]
        texts += [image.long for image in self.retrieval]
        for language in LANGUAGES:
            indices = range(len(self.concepts)) if language == "en" else self.language_concepts
            texts += [prompt for prompts in self.class_prompts(language, list(indices)) for prompt in prompts]
        return list(dict.fromkeys(texts))


def make_task(size: Size, seed: int) -> Task:
    """Draw the task. Images and captions of `alignment`, `test` and `inheritance_texts` come from streams of their own, so that a change
    of one size leaves the others as they were.
    """
    concepts = load_concepts(size.concepts)

    def images(stream: str, indices: range, views: int) -> list[TaskImage]:
        rng = random.Random(f"{stream}-{seed}")
        drawn = []
        for _ in range(views):
            for index in indices:
                view = random_view(rng)
                concept = concepts[index]
                drawn.append(
                    TaskImage(index, view, short_caption(concept, view, rng), long_caption(concept, view, rng))
                )
        return drawn

    alignment = images("alignment", range(size.seen), size.alignment_views)
    test = images("test", range(size.concepts), size.test_views)
    # Texts are cheap: stage 1 reads captions of all concepts, of images that nobody draws.
    captions = images("inheritance", range(size.concepts), 4)
    texts = [template.format(concept.name) for concept in concepts for template in ZERO_SHOT_TEMPLATES]
    texts += [caption for image in captions for caption in (image.short, image.long)]
    texts += [caption for image in alignment for caption in (image.short, image.long)]
    return Task(size, concepts, alignment, test, list(dict.fromkeys(texts)))


def held_out_concepts() -> list[Concept]:
    """The 150 concepts by which the quickstart compares languages. They are the same for every seed."""
    task = make_task(SIZES["full"], seed=0)
    return [task.concepts[i] for i in task.language_concepts]


def draw(task: Task, images: list[TaskImage]) -> list[Image.Image]:
    """Render `images`."""
    return [render(task.concepts[image.concept], image.view) for image in images]


class ImageDataset(Dataset):
    """Rows `{"pixel_values": (3, height, width), "text": [short caption, long caption]}`, drawn and processed once."""

    def __init__(self, task: Task, images: list[TaskImage], image_processor):
        self.pixel_values = image_processor(draw(task, images), return_tensors="pt").pixel_values
        self.texts = [[image.short, image.long] for image in images]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | list[str]]:
        return {"pixel_values": self.pixel_values[index], "text": self.texts[index]}
