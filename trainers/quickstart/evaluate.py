"""How well a model names and finds the quickstart's test images, in every language."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trainers.evaluation import retrieval_recall, zero_shot_accuracy, zero_shot_classifier
from trainers.openmoji.images import LANGUAGES
from trainers.openmoji.task import Task


@torch.inference_mode()
def embed_images(model: torch.nn.Module, pixel_values: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """`(num_images, projection_dim)` image embeddings, not normalised, a batch at a time."""
    model.eval()
    return torch.cat(
        [model.get_image_features(pixel_values=batch).pooler_output for batch in pixel_values.split(batch_size)]
    )


def score(task: Task, image_embeds: torch.Tensor, embed_texts: Callable[[list[str]], torch.Tensor]) -> dict[str, Any]:
    """One row of the quickstart's table, all fractions.

    Zero-shot is over all concepts, on images of the seen and of the unseen ones; by language it is over `task.language_concepts`.

    Args:
        task: The task.
        image_embeds: `(num_test_images, projection_dim)`, of the images `task.test` in their order.
        embed_texts: Texts to their embeddings `(num_texts, projection_dim)`.
    """
    concepts = torch.tensor([image.concept for image in task.test])
    english = _classifier(task, embed_texts, "en", list(range(len(task.concepts))))
    seen = concepts < task.size.seen
    row: dict[str, Any] = {
        f"zero_shot_{name}": zero_shot_accuracy(image_embeds[rows], english, concepts[rows])["top1"]
        for name, rows in (("seen", seen), ("unseen", ~seen))
    }
    retrieval = task.retrieval
    recall = retrieval_recall(
        image_embeds[: len(retrieval)],
        embed_texts([image.long for image in retrieval]),
        torch.arange(len(retrieval)),
    )
    row |= {key: recall[key] for key in ("i2t_r@1", "t2i_r@1")}
    row["zero_shot_by_language"] = zero_shot_by_language(task, image_embeds, embed_texts, task.language_concepts)
    return row


def zero_shot_by_language(
    task: Task,
    image_embeds: torch.Tensor,
    embed_texts: Callable[[list[str]], torch.Tensor],
    indices: list[int],
    *,
    languages: Sequence[str] = LANGUAGES,
    shown: Sequence[int] | None = None,
) -> dict[str, float]:
    """Zero-shot top-1 by language over the concepts `indices`, on the test images of those of them that are `shown`, by default all; other
    arguments as for [`score`].
    """
    concepts = torch.tensor([image.concept for image in task.test])
    rank = {concept: i for i, concept in enumerate(indices)}
    tested = rank.keys() if shown is None else set(shown)
    rows = torch.tensor([i for i, concept in enumerate(concepts.tolist()) if concept in tested])
    labels = torch.tensor([rank[concept] for concept in concepts[rows].tolist()])
    return {
        language: zero_shot_accuracy(image_embeds[rows], _classifier(task, embed_texts, language, indices), labels)[
            "top1"
        ]
        for language in languages
    }


def _classifier(
    task: Task, embed_texts: Callable[[list[str]], torch.Tensor], language: str, indices: list[int]
) -> torch.Tensor:
    prompts = task.class_prompts(language, indices)
    classes = [i for i, ensemble in enumerate(prompts) for _ in ensemble]
    return zero_shot_classifier(
        embed_texts([prompt for ensemble in prompts for prompt in ensemble]), torch.tensor(classes)
    )


def rank_images(
    task: Task, image_embeds: torch.Tensor, embed_texts: Callable[[list[str]], torch.Tensor], count: int = 4
) -> list[list[int]]:
    """For each of `task.example_queries`, the `count` images of `task.retrieval` that its caption finds first."""
    images = torch.nn.functional.normalize(image_embeds[: len(task.retrieval)], dim=-1)
    captions = embed_texts([task.retrieval[query].long for query in task.example_queries])
    return (captions @ images.T).topk(count, dim=1).indices.tolist()
