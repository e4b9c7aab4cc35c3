"""Retrieval examples for the report: captions that the model misses before those that it finds, with what every model finds."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from modeling_proclip.images import decode_image


THUMBNAIL = 112  # pixels, longest side


@dataclass(frozen=True, eq=False)
class Retrieved:
    """What one model did in text-to-image retrieval.

    Attributes:
        model: its name.
        image_embeds: `(num_images, p)`.
        text_embeds: `(num_texts, p)`.
        ranks: `(num_texts,)`, how many wrong images come before the right one.
    """

    model: str
    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    ranks: torch.Tensor


def retrieval_examples(
    task: str,
    texts: Sequence[str],
    text_to_image: torch.Tensor,
    retrieved: Sequence[Retrieved],
    image: Callable[[int], Image.Image],
    seed: int,
    baseline: Retrieved | None = None,
) -> list[dict[str, Any]]:
    """Draws captions by `seed`, at most one of an image, and gives for each the right image and what every model finds first.

    Args:
        task: its name.
        texts, text_to_image: the captions, and `(num_texts,)` the image of each.
        retrieved: results of the model that the examples are for, then of others that are shown beside it.
        image: number of an image to the image.
        baseline: results of the model that they came from, which is shown before them.

    Returns:
        What `examples.json` holds: "task", "heading", "query", "picture" (data URI), and "found", for each model its name as "model",
        "rank" (0: right) and "picture", what it finds first.
    """
    own = retrieved[0]
    missed = own.ranks.numpy() > 0
    if baseline is not None:
        missed_before = baseline.ranks.numpy() > 0
        kinds = [
            (f"{own.model} misses what {baseline.model} finds", missed & ~missed_before, 3),
            (f"{own.model} and {baseline.model} both miss", missed & missed_before, 2),
            (f"{own.model} finds what {baseline.model} misses", ~missed & missed_before, 2),
            (f"{own.model} and {baseline.model} both find", ~missed & ~missed_before, 1),
        ]
    else:
        kinds = [(f"{own.model} misses", missed, 5), (f"{own.model} finds", ~missed, 2)]
    shown = [*([] if baseline is None else [baseline]), *retrieved]
    rng = np.random.default_rng(seed)
    used: set[int] = set()
    examples = []
    for heading, mask, count in kinds:
        for text in rng.permutation(np.flatnonzero(mask)).tolist():
            right = int(text_to_image[text])
            if count == 0:
                break
            if right in used:
                continue
            used.add(right)
            count -= 1
            found = [
                {
                    "model": entry.model,
                    "rank": int(entry.ranks[text]),
                    "picture": thumbnail(image(_first(entry, text, right))),
                }
                for entry in shown
            ]
            examples.append(
                {
                    "task": task,
                    "heading": heading,
                    "query": texts[text],
                    "picture": thumbnail(image(right)),
                    "found": found,
                }
            )
    return examples


def thumbnail(image: Image.Image) -> str:
    """An image as a JPEG of at most 112 x 112 pixels in a data URI: 2 to 5 kB."""
    image = decode_image(image)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _first(entry: Retrieved, text: int, right: int) -> int:
    """The image that `text` finds first. As in the ranks, a tie with the right one counts against the model."""
    if int(entry.ranks[text]) == 0:
        return right
    query = F.normalize(entry.text_embeds[text].double(), dim=0)
    scores = torch.cat([F.normalize(block.double(), dim=1) @ query for block in entry.image_embeds.split(4096)])
    scores[right] = -2.0
    return int(scores.argmax())
