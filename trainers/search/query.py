"""Questions to an index: by text, by image, by both, with filters, and by words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lancedb.rerankers import RRFReranker
from torch.nn import functional as F

from modeling_proclip.images import decode_image
from trainers.evaluation.scoring.encoders import Encoder

from .quantized import search_quantized
from .table import ImageIndex


# Columns of a result. The thumbnail is JPEG.
COLUMNS = ("path", "width", "height", "taken", "caption", "size")
# How many of the approximate index's partitions are searched, and how many times the asked number of candidates are then compared exactly.
_PARTITIONS, _CANDIDATES = 50, 10


@dataclass(frozen=True)
class Question:
    """What is asked for.

    Args:
        text: what the image shows.
        image: a path, bytes or an image of Pillow that it is like. With `text`, both count.
        negative: what it does not show.
        image_weight: share of `image` where there is a text too, 0 to 1.
        negative_weight: how much `negative` is subtracted, in embeddings of unit length.
    """

    text: str | None = None
    image: Any = None
    negative: str | None = None
    image_weight: float = 0.5
    negative_weight: float = 0.5

    def __post_init__(self) -> None:
        if not self.text and self.image is None:
            raise ValueError("there is nothing to search for: give a text, an image, or both")
        if not 0 <= self.image_weight <= 1:
            raise ValueError(f"the weight of the image must be from 0 to 1, got {self.image_weight}")

    def embedding(self, encoder: Encoder, dim: int | None = None) -> torch.Tensor:
        """`(dim,)` float32 of unit length; `dim` is that of the index, or None for all dimensions."""
        parts: list[tuple[float, torch.Tensor]] = []
        if self.text:
            weight = 1.0 if self.image is None else 1 - self.image_weight
            parts.append((weight, embed_text(encoder, self.text, dim)))
        if self.image is not None:
            weight = self.image_weight if self.text else 1.0
            parts.append((weight, embed_image(encoder, self.image, dim)))
        if self.negative:
            parts.append((-self.negative_weight, embed_text(encoder, self.negative, dim)))
        joined = sum((weight * part for weight, part in parts), torch.zeros_like(parts[0][1]))
        return F.normalize(joined, dim=-1)


def embed_text(encoder: Encoder, text: str, dim: int | None = None) -> torch.Tensor:
    """The embedding `(dim,)` of a text in the space of the images, float32, of unit length."""
    (batch,) = encoder.encode_texts([text])
    return F.normalize(encoder.project_texts(batch.embeddings)[0, :dim].float(), dim=-1)


def embed_image(encoder: Encoder, image: Any, dim: int | None = None) -> torch.Tensor:
    """The embedding `(dim,)` of an image (path, bytes, Pillow), float32, of unit length."""
    return F.normalize(encoder.encode_images(encoder.prepare_images([decode_image(image)]))[0, :dim], dim=-1)


def search(
    index: ImageIndex,
    embedding: torch.Tensor,
    top: int = 12,
    where: str | None = None,
    words: str | None = None,
    columns: Sequence[str] = COLUMNS,
    exact: bool = False,
) -> list[dict[str, Any]]:
    """The images nearest to `embedding`, best first.

    Args:
        embedding: `(index.dim,)`, of unit length.
        top: how many.
        where: an SQL condition on `path`, `size` (bytes), `width`, `height` (pixels), `taken` (`2025-01-31T12:00:00`), `caption`.
        words: words that captions and file names are searched for as well; both orders are joined by reciprocal rank.
        columns: columns of the results.
        exact: compare with every embedding even where there is an approximate index. Binary embeddings are compared by their signs, and the
            best [`_CANDIDATES`] times `top` with `embedding` itself.

    Returns:
        The `columns` of each, and "score": the cosine, or with `words` the joined reciprocal rank.

    Raises:
        ValueError: If the embedding has another size, or `where` is no condition on these columns.
    """
    if embedding.shape != (index.dim,):
        raise ValueError(f"the embedding has the shape {tuple(embedding.shape)}, those of {index.path} ({index.dim},)")
    try:
        if index.precision == "float32":
            return _search_float32(index, embedding, top, where, words, columns, exact)
        return search_quantized(index, embedding, top, where, words, columns, top * _CANDIDATES, _PARTITIONS, exact)
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0].split(", /")[0]  # without the place in the database's own code
        if "INVERTED index" in reason:
            raise ValueError(
                f"{index.path} is not ready for words: repeat `proclip index`, which makes their index last"
            ) from error
        if where is None:
            raise ValueError(f"{index.path} cannot be searched: {reason}") from error
        raise ValueError(f"--where {where!r:.200} is not a condition that the index understands: {reason}") from error


def _search_float32(
    index: ImageIndex,
    embedding: torch.Tensor,
    top: int,
    where: str | None,
    words: str | None,
    columns: Sequence[str],
    exact: bool,
) -> list[dict[str, Any]]:
    vector = embedding.numpy()
    query: Any  # the database's builders share no type
    if words:
        query = index.images.search(query_type="hybrid", vector_column_name="embedding").vector(vector).text(words)
        query = query.rerank(RRFReranker())
        score = "_relevance_score"
    else:
        query, score = index.images.search(vector, vector_column_name="embedding"), "_distance"
    query = query.distance_type("cosine")
    query = query.bypass_vector_index() if exact else query.nprobes(_PARTITIONS).refine_factor(_CANDIDATES)
    if where:
        query = query.where(where, prefilter=True)
    if not words:
        query = query.select([*columns, score])
    return [
        {name: row[name] for name in columns} | {"score": row[score] if words else 1 - row[score]}
        for row in query.limit(top).to_list()
    ]


def describe(index: ImageIndex, exact: bool) -> str:
    """How a search goes through `index`, in a sentence."""
    approximate = any(config.name == "embedding_idx" for config in index.images.list_indices())
    if exact or not approximate:
        if index.precision == "binary":
            return (
                f"exact: the signs of the question are compared with those of all {len(index):,} embeddings, and the question itself with the best "
                f"{_CANDIDATES} for every result"
            )
        return f"exact: the query is compared with all {len(index):,} embeddings"
    statistics = index.images.index_stats("embedding_idx")
    bits = "1 bit" if index.precision == "binary" else "8 bits"
    return (
        f"approximate: {statistics.num_indexed_rows:,} embeddings of {bits}, of which the {_PARTITIONS} nearest partitions are searched and the "
        f"best candidates compared exactly; {statistics.num_unindexed_rows:,} new ones all compared exactly"
    )
