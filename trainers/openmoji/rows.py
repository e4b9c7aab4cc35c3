"""The quickstart's test images as rows of a benchmark: everything that it needs is installed, nothing is fetched."""

import io
from typing import Any

import datasets


# Concepts that the quickstart's alignment saw images of, and the images of all concepts that it tests on, in this order.
PARTS = (
    "seen",
    "unseen",
    "retrieval",
    "probe-train",
    "probe-test",
    *(f"language-{code}" for code in "en es pt it fr de id tr ru zh ja ko ar fa".split()),
    *(f"captions-{code}" for code in "en es pt fr de zh".split()),
)


def openmoji_rows(part: str, size: str = "full", seed: int = 0) -> datasets.Dataset:
    """The rows of one part of the quickstart's test data, drawn by `seed`.

    Args:
        part: "seen" or "unseen" (`image`, `label` among all concepts), "probe-train" or "probe-test" (the same of all concepts, half of each
            one's images), "retrieval" (`image`, `caption`), "language-xx" (`image`, `label` among the concepts by which languages are
            compared; the class names are in that language) or "captions-xx" (`image`, `caption` in that language, of the same concepts).

    Raises:
        ValueError: If there is no such part.
        ImportError: If the packages with the images and names are missing.
    """
    from .task import SIZES, draw, make_task

    if part not in PARTS:
        raise ValueError(f"config of an openmoji benchmark must be one of {', '.join(PARTS)}, got {part!r}")
    task = make_task(SIZES[size], seed)
    images = task.test
    if part == "retrieval":
        images = task.retrieval
    elif part in ("seen", "unseen"):
        images = [image for image in images if (image.concept < task.size.seen) == (part == "seen")]
    elif part.startswith("probe-"):
        # Images come view by view: every concept once, then every concept again.
        half = len(images) // 2
        images = images[:half] if part == "probe-train" else images[half:]
    elif part.startswith("captions-"):
        images = task.language_retrieval
    else:
        named = set(task.language_concepts)
        images = [image for image in images if image.concept in named]
    columns: dict[str, list[Any]] = {"image": [{"bytes": _png(image), "path": None} for image in draw(task, images)]}
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    if part == "retrieval" or part.startswith("captions-"):
        columns["caption"] = task.long_captions(
            images, "en" if part == "retrieval" else part.removeprefix("captions-")
        )
        features["caption"] = datasets.Value("string")
    else:
        language = part.removeprefix("language-") if part.startswith("language-") else "en"
        indices = task.language_concepts if part.startswith("language-") else list(range(len(task.concepts)))
        place = {concept: i for i, concept in enumerate(indices)}
        columns["label"] = [place[image.concept] for image in images]
        names = [task.concepts[i].names[language] for i in indices]
        features["label"] = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
