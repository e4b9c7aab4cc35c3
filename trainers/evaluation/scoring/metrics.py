"""Retrieval and zero-shot metrics as pure functions of embeddings.

Results are those of float64 cosine similarities, whatever the dtype and the length of the embeddings. Two scores within
1e-12 of each other are a tie, and a tie counts against the model: an item that scores the same as the right one ranks
before it, so a model that gives every input one and the same embedding scores 0 and not 100 %.
Similarities exist one block at a time, never as a whole matrix. For several languages call these once per language.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .ranks import TIE, Retrieval, exact_ranks, ranks_up_to, unit


_BLOCK = 1 << 21  # zero-shot scores that exist at a time: 16 MB


@torch.no_grad()
def retrieval_recall(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: torch.Tensor | Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall@k of image-to-text and text-to-image retrieval, with any number of captions an image.

    Image to text is a hit if at least one of the image's captions is among the k nearest texts; the other captions of
    the image compete with nothing. Text to image is a hit if the caption's image is among the k nearest images.
    A k above the number of candidates is allowed, and its recall is 1.

    Args:
        image_embeds: `(num_images, dim)`, of any length and floating dtype; normalised here.
        text_embeds: `(num_texts, dim)`, likewise.
        text_to_image: `(num_texts,)` integers, the row in `image_embeds` that each text describes.
        ks: the k to report.

    Returns:
        `{"i2t_r@1": ..., "t2i_r@1": ..., ...}`, fractions between 0 and 1.

    Raises:
        ValueError: no images or texts, sizes that do not match, NaN or infinite values, an index out of range, an
            image without a caption, or a k below 1.
    """
    _check_ks(ks)
    image_ranks, text_ranks = ranks_up_to(ks, _score_right_answers(image_embeds, text_embeds, text_to_image))
    return {
        f"{direction}_r@{k}": int((ranks < k).sum()) / len(ranks)
        for k in ks
        for direction, ranks in (("i2t", image_ranks), ("t2i", text_ranks))
    }


def caption_retrieval(
    first_embeds: torch.Tensor, second_embeds: torch.Tensor, ks: Sequence[int] = (1,)
) -> dict[str, float]:
    """Caption-to-caption retrieval: the measure of a caption-contrastively tuned LLM (LLM2CLIP, arXiv 2411.04997).

    Two captions of each image retrieve each other: the first among all second captions, and the second among all first
    ones. LLM2CLIP reports top-1 over the first two captions of COCO's 5,000 images.

    Args:
        first_embeds, second_embeds: `(num_images, dim)`, of any length and floating dtype; normalised here. Rows of one
            number are captions of one image.
        ks: the k to report. A k above the number of images is allowed, and its recall is 1.

    Returns:
        `{"caption_r@1": ...}`, fractions, the mean over both directions.

    Raises:
        ValueError: no images, shapes that differ, NaN or infinite values, or a k below 1.
    """
    recall = retrieval_recall(first_embeds, second_embeds, torch.arange(len(second_embeds)), ks)
    return {f"caption_r@{k}": (recall[f"i2t_r@{k}"] + recall[f"t2i_r@{k}"]) / 2 for k in ks}


@torch.no_grad()
def retrieval_ranks(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, text_to_image: torch.Tensor | Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many wrong answers come before the right one, for every image and every text, `(num_images,)` and `(num_texts,)` int64 on the CPU; an image's
    rank is that of the best of its captions. [`retrieval_recall`] at k is the share of the ranks below k, in half the time.
    """
    image_ranks, text_ranks = exact_ranks(_score_right_answers(image_embeds, text_embeds, text_to_image))
    return image_ranks.long().cpu(), text_ranks.long().cpu()


@torch.no_grad()
def zero_shot_accuracy(
    image_embeds: torch.Tensor,
    class_embeds: torch.Tensor,
    labels: torch.Tensor | Sequence[int],
    ks: Sequence[int] = (1, 5),
) -> dict[str, float]:
    """Share of the images whose class is among the k nearest class embeddings.

    Args:
        image_embeds: `(num_images, dim)`, of any length and floating dtype; normalised here.
        class_embeds: `(num_classes, dim)`, likewise, as from `zero_shot_classifier`.
        labels: `(num_images,)` integers, the row in `class_embeds` that each image belongs to.
        ks: the k to report. A k above the number of classes is allowed, and its accuracy is 1.

    Returns:
        `{"top1": ..., "top5": ...}`, fractions between 0 and 1.

    Raises:
        ValueError: no images or classes, sizes that do not match, NaN or infinite values, a label out of range, or a
            k below 1.
    """
    _check_ks(ks)
    ranks, _ = zero_shot_ranks(image_embeds, class_embeds, labels)
    return {f"top{k}": int((ranks < k).sum()) / len(ranks) for k in ks}


@torch.no_grad()
def zero_shot_ranks(
    image_embeds: torch.Tensor, class_embeds: torch.Tensor, labels: torch.Tensor | Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many wrong classes come before the right one, and which class is nearest, for every image: `(num_images,)` int64 each, on the CPU. Where the
    right class ties with a wrong one, its rank counts the wrong one as before it, and so the prediction is the nearest of the wrong ones.
    """
    _check_embeds(image_embeds=image_embeds, class_embeds=class_embeds)
    device = torch.device("cpu") if image_embeds.device.type == "mps" else image_embeds.device
    images, classes = image_embeds.to(device), unit(class_embeds.to(device))
    labels = _check_index("labels", labels, "image", len(images), "classes", len(classes)).to(device)
    ranks, predictions = torch.empty_like(labels), torch.empty_like(labels)
    block = max(1, _BLOCK // len(classes))
    for start in range(0, len(images), block):
        rows = slice(start, start + block)
        scores = unit(images[rows]) @ classes.T
        own = labels[rows, None]
        target = scores.gather(1, own)
        ranks[rows] = (scores >= target - TIE).sum(1) - 1
        nearest_wrong = scores.scatter(1, own, -2.0).argmax(1)
        predictions[rows] = torch.where(ranks[rows] == 0, labels[rows], nearest_wrong)
    return ranks.cpu(), predictions.cpu()


def mean_per_class_accuracy(correct: torch.Tensor, labels: torch.Tensor | Sequence[int]) -> float:
    """The mean over the classes of the share of a class's images that are right, so that every class weighs the same.

    It is the metric of Aircraft, Pets, Caltech-101 and Flowers in the zero-shot suite of CLIP (arXiv 2103.00020, appendix A), which ProCLIP's Table 2
    follows. `correct (num_images,)` are booleans, `labels` whole numbers from 0. A class without images has no share and is left out of the mean.
    """
    labels = torch.as_tensor(labels)
    if correct.dim() != 1 or correct.shape != labels.shape or len(labels) == 0:
        raise ValueError(
            f"correct and labels must be two rows of equal length and not empty, but have shapes {tuple(correct.shape)} and {tuple(labels.shape)}."
        )
    right = torch.bincount(labels, weights=correct.double())
    counts = torch.bincount(labels)
    present = counts > 0
    return float((right[present] / counts[present]).mean())


def zero_shot_classifier(text_embeds: torch.Tensor, class_index: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """Prompt ensemble: the class embedding is the mean of its prompts' unit-length embeddings, brought to unit length.

    Args:
        text_embeds: `(num_prompts, dim)`, of any length and floating dtype; normalised here. One row is one prompt,
            such as "a photo of a cat".
        class_index: `(num_prompts,)` integers, the class of each prompt. Classes are numbered from 0 without gaps.

    Returns:
        `(num_classes, dim)`, unit length, float32 (float64 for float64 embeddings).

    Raises:
        ValueError: no prompts, sizes that do not match, NaN or infinite values, a negative class, or a class without
            a prompt.
    """
    _check_embeds(text_embeds=text_embeds)
    class_index = torch.as_tensor(class_index)
    num_classes = int(class_index.max()) + 1 if class_index.numel() else 1
    class_index = _check_index("class_index", class_index, "prompt", len(text_embeds), "classes", num_classes)
    without = torch.bincount(class_index.cpu(), minlength=num_classes) == 0
    if without.any():
        raise ValueError(f"class_index has no prompt for class {int(without.nonzero()[0])} of {num_classes} classes.")
    dtype = torch.promote_types(text_embeds.dtype, torch.float32)
    units = F.normalize(text_embeds.to(dtype), dim=-1)
    sums = units.new_zeros(num_classes, units.shape[1]).index_add(0, class_index.to(units.device), units)
    # The sum points where the mean does.
    return F.normalize(sums, dim=-1)


def _score_right_answers(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, text_to_image: torch.Tensor | Sequence[int]
) -> Retrieval:
    """The checked arguments of a retrieval, with the scores of the right answers."""
    _check_embeds(image_embeds=image_embeds, text_embeds=text_embeds)
    # Apple's GPUs have no float64.
    device = torch.device("cpu") if image_embeds.device.type == "mps" else image_embeds.device
    images, texts = image_embeds.to(device), text_embeds.to(device)
    text_to_image = _check_index("text_to_image", text_to_image, "text", len(texts), "images", len(images)).to(device)
    without = torch.bincount(text_to_image, minlength=len(images)) == 0
    if without.any():
        raise ValueError(
            f"{int(without.sum())} of {len(images)} images have no caption, the first is image "
            f"{int(without.nonzero()[0])}. Leave them out of image_embeds and renumber text_to_image."
        )
    some = zip(texts.split(1024), text_to_image.split(1024), strict=True)
    text_targets = torch.cat([(unit(rows) * unit(images[own])).sum(-1) for rows, own in some])
    image_targets = text_targets.new_full((len(images),), -2.0)
    image_targets.scatter_reduce_(0, text_to_image, text_targets, "amax")
    return Retrieval(images, texts, text_to_image, image_targets, text_targets)


def _check_ks(ks: Sequence[int]) -> None:
    if len(ks) == 0 or min(ks) < 1:
        raise ValueError(f"ks must be one or more whole numbers of at least 1, but is {tuple(ks)}.")


def _check_embeds(**named: torch.Tensor) -> None:
    """ValueError unless the embeddings are rows of finite numbers, all of one space."""
    for name, embeds in named.items():
        if embeds.dim() != 2 or len(embeds) == 0 or not embeds.is_floating_point():
            raise ValueError(
                f"{name} must be floating point numbers of shape (rows, dim) with at least one row, "
                f"but has shape {tuple(embeds.shape)} and dtype {embeds.dtype}."
            )
        finite = torch.isfinite(embeds).all(-1)
        if not finite.all():
            raise ValueError(f"{name} has NaN or infinite values, first in row {int((~finite).nonzero()[0])}.")
    dims = [str(embeds.shape[1]) for embeds in named.values()]
    if len(set(dims)) > 1:
        raise ValueError(
            f"{' and '.join(named)} must be embeddings of one space, but have {' and '.join(dims)} dimensions."
        )


def _check_index(
    name: str, index: torch.Tensor | Sequence[int], item: str, items: int, targets: str, num_targets: int
) -> torch.Tensor:
    index = torch.as_tensor(index)
    if index.is_floating_point() or index.dtype == torch.bool or index.shape != (items,):
        raise ValueError(
            f"{name} must be {items} whole numbers, one for each {item}, but has shape {tuple(index.shape)} and "
            f"dtype {index.dtype}."
        )
    outside = (index < 0) | (index >= num_targets)
    if outside.any():
        first = int(outside.nonzero()[0])
        raise ValueError(
            f"{name}[{first}] is {int(index[first])}, but the {num_targets} {targets} go from 0 to {num_targets - 1}."
        )
    return index.long()
