"""Searches of an index: by text, by image, by both, with filters, and by words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lancedb.rerankers import RRFReranker
from torch.nn import functional as F

from modeling_proclip.images import decode_image
from trainers.evaluation.scoring.encoders import Encoder

from .quantized import search_quantized
from .request import CANDIDATES, PARTITIONS, SearchRequest
from .table import ImageIndex


# Columns of a result. The thumbnail is JPEG.
COLUMNS = ("path", "width", "height", "taken", "caption", "size")


@dataclass(frozen=True)
class Question:
    """What to search for.

    Args:
        text: what the images show.
        image: a path, bytes or Pillow image that they resemble. With `text`, both count.
        negative: what they do not show.
        image_weight: share of `image` beside a text, 0 to 1.
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
            best [`CANDIDATES`] times `top` with `embedding` itself.

    Returns:
        The `columns` of each, and "score": the cosine, or with `words` the joined reciprocal rank.

    Raises:
        ValueError: If the embedding has another size, or `where` is no condition on these columns.
    """
    if embedding.shape != (index.dim,):
        raise ValueError(
            f"the embedding has shape {tuple(embedding.shape)}, but those of {index.path} have shape ({index.dim},)"
        )
    request = SearchRequest(embedding, top, where, words, columns, exact)
    try:
        return _search_float32(index, request) if index.precision == "float32" else search_quantized(index, request)
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0].split(", /")[0]  # without the place in the database's own code
        if "INVERTED index" in reason:
            raise ValueError(
                f"{index.path} cannot be searched by words yet: repeat `proclip index`, which indexes the words last"
            ) from error
        if where is None:
            raise ValueError(f"{index.path} cannot be searched: {reason}") from error
        raise ValueError(f"--where {where!r:.200} is not a condition that the index understands: {reason}") from error


def _search_float32(index: ImageIndex, request: SearchRequest) -> list[dict[str, Any]]:
    vector = request.embedding.numpy()
    query: Any  # the database's builders have no common type
    if request.words:
        query = index.images.search(query_type="hybrid", vector_column_name="embedding")
        query = query.vector(vector).text(request.words).rerank(RRFReranker())
        score = "_relevance_score"
    else:
        query, score = index.images.search(vector, vector_column_name="embedding"), "_distance"
    query = query.distance_type("cosine")
    query = query.bypass_vector_index() if request.exact else query.nprobes(PARTITIONS).refine_factor(CANDIDATES)
    if request.where:
        query = query.where(request.where, prefilter=True)
    if not request.words:
        query = query.select([*request.columns, score])
    return [
        {name: row[name] for name in request.columns} | {"score": row[score] if request.words else 1 - row[score]}
        for row in query.limit(request.top).to_list()
    ]


def describe(index: ImageIndex, exact: bool) -> str:
    """How a search goes through `index`, in a sentence."""
    approximate = any(config.name == "embedding_idx" for config in index.images.list_indices())
    if exact or not approximate:
        if index.precision == "binary":
            return (
                f"exact: the signs of the query are compared with those of all {len(index):,} embeddings, and the query itself with the best "
                f"{CANDIDATES} for each result"
            )
        return f"exact: the query is compared with all {len(index):,} embeddings"
    statistics = index.images.index_stats("embedding_idx")
    bits = "1 bit" if index.precision == "binary" else "8 bits"
    return (
        f"approximate: {statistics.num_indexed_rows:,} embeddings of {bits}; the {PARTITIONS} nearest partitions are searched, and the best candidates "
        f"compared exactly, as are all {statistics.num_unindexed_rows:,} new embeddings"
    )
