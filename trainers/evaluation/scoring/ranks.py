"""Counts the wrong answers that come before the right one in retrieval: exactly, or only as far as needed to compare the count with some k.

All scores are cosine similarities in float64, or bounds of them. Scores within 1e-12 of each other are a tie, and a tie counts against the model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from trainers.compute.onednn import fastest_linear


# Rounding of a float64 dot product of unit vectors is below dim x 1.1e-16; what differs by less than this is the same.
TIE = 1e-12
# Images and texts in a block of scores: 8 MB in float32. Much larger ones leave the cache, and counting them then costs
# as much as the matrix product.
_ROWS, _COLUMNS = 2048, 1024


class Retrieval(NamedTuple):
    """Embeddings of any length on a device that has float64, and how the right answers score.

    Attributes:
        images, texts: `(rows, dim)` and `(columns, dim)`.
        own_row: `(columns,)`, the row of the image that a text describes, -1 if it is not among `images`.
        image_targets, text_targets: `(rows,)` and `(columns,)` float64, the scores of the right answers; of an image, that of its best text.
    """

    images: torch.Tensor
    texts: torch.Tensor
    own_row: torch.Tensor
    image_targets: torch.Tensor
    text_targets: torch.Tensor


def unit(embeds: torch.Tensor) -> torch.Tensor:
    """`embeds` at unit length in float64."""
    return F.normalize(embeds.double(), dim=-1)


def exact_ranks(retrieval: Retrieval) -> tuple[torch.Tensor, torch.Tensor]:
    """How many wrong answers score higher than the right one or tie with it: `(rows,)` of the images and `(columns,)` of the texts, int32."""
    _, image_ranks, _, text_ranks = _count_ahead(retrieval, torch.float64)
    return image_ranks, text_ranks


def ranks_up_to(ks: Sequence[int], retrieval: Retrieval) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`exact_ranks`], with ranks that are only on the right side of every k.

    On the CPU, float32 takes a fifth of the time of float64 and bounds nearly every rank closely enough; the few queries that it leaves open are
    done again. GPUs may round "float32" products to ten bits, and have no need.
    """
    images, texts, own_row, image_targets, text_targets = retrieval
    if images.device.type != "cpu" or not _keeps_float32(images.shape[1]):
        return exact_ranks(retrieval)
    image_sure, image_ranks, text_sure, text_ranks = _count_ahead(retrieval, torch.float32)
    redo = _is_open(text_sure, text_ranks, ks)
    _, text_ranks[redo] = exact_ranks(
        retrieval._replace(texts=texts[redo], own_row=own_row[redo], text_targets=text_targets[redo])
    )
    redo = _is_open(image_sure, image_ranks, ks)
    row = torch.where(redo, redo.cumsum(0) - 1, -1)
    image_ranks[redo], _ = exact_ranks(
        retrieval._replace(images=images[redo], own_row=row[own_row], image_targets=image_targets[redo])
    )
    return image_ranks, text_ranks


def _is_open(sure: torch.Tensor, maybe: torch.Tensor, ks: Sequence[int]) -> torch.Tensor:
    """Which of the queries could be a hit or a miss for some k, with so many wrong answers surely and maybe ahead."""
    return torch.stack([(sure < k) & (maybe >= k) for k in ks]).any(0)


def _count_ahead(
    retrieval: Retrieval, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts wrong answers by scores in `dtype`, one block at a time. For the images, then for the texts: how many score higher than the target
    for sure, and how many score higher or are tied as far as `dtype` can tell. In float64 the latter is the rank.
    """
    images, texts, own_row, image_targets, text_targets = retrieval
    # The error of a dot product of rounded unit vectors is at most (dim / 2 + 1) eps.
    margin = TIE if dtype == torch.float64 else (texts.shape[1] + 2) * torch.finfo(dtype).eps
    images = unit(images).to(dtype)
    image_bounds = (image_targets + margin).to(dtype)[:, None], (image_targets - margin).to(dtype)[:, None]
    text_bounds = (text_targets + margin).to(dtype), (text_targets - margin).to(dtype)
    image_sure, image_maybe = torch.zeros_like(image_targets, dtype=torch.int32).repeat(2, 1)
    text_sure, text_maybe = torch.zeros_like(text_targets, dtype=torch.int32).repeat(2, 1)
    for left in range(0, len(texts), _COLUMNS):
        columns = slice(left, left + _COLUMNS)
        some_texts = unit(texts[columns]).to(dtype)
        for top in range(0, len(images), _ROWS):
            rows = slice(top, top + _ROWS)
            scores = _products(images[rows], some_texts)
            own = own_row[columns] - top
            column = ((own >= 0) & (own < len(scores))).nonzero().squeeze(1)
            scores[own[column], column] = -2.0
            text_sure[columns] += _count_true(scores > text_bounds[0][columns], 0)
            text_maybe[columns] += _count_true(scores >= text_bounds[1][columns], 0)
            image_sure[rows] += _count_true(scores > image_bounds[0][rows], 1)
            image_maybe[rows] += _count_true(scores >= image_bounds[1][rows], 1)
    return image_sure, image_maybe, text_sure, text_maybe


def _products(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Dot products `(rows, columns)` of `images (rows, dim)` and `texts (columns, dim)` in their dtype."""
    with torch.autocast(images.device.type, enabled=False), fastest_linear(images.device):
        return F.linear(images, texts)


def _keeps_float32(dim: int) -> bool:
    """Whether products of float32 are of float32 here. Settings of torch and of oneDNN can let them round to bfloat16 first."""
    rows = torch.zeros(64, max(dim, 1))
    rows[:, 0] = 1 + 2**-20
    ones = rows.gt(0).float()
    return bool((_products(rows, ones) == 1 + 2**-20).all())


def _count_true(mask: torch.Tensor, along: int) -> torch.Tensor:
    """`mask.sum(along, dtype=torch.int32)` of a matrix of booleans.

    Torch widens every boolean before it adds. Where the sizes allow, eight neighbours are added at once instead, as the
    bytes of an int64: up to 255 of them before a byte overflows. That takes a tenth of the time.
    """
    rows, columns = mask.shape
    if columns % 8 or not mask.is_contiguous() or (along == 1 and columns > 8 * 255):
        return mask.sum(along, dtype=torch.int32)
    words = mask.view(torch.int64)
    if along == 1:
        return words.sum(1).view(rows, 1).view(torch.uint8).sum(1, dtype=torch.int32)
    counts = torch.zeros(columns, dtype=torch.int32, device=mask.device)
    for some in words.split(255):
        counts += some.sum(0).view(torch.uint8)
    return counts
