"""Search among embeddings of one byte or one bit a dimension, with the query in float32."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import torch

from trainers.compute.precision import unit_length
from trainers.compute.quantization import Quantization

from .request import CANDIDATES, PARTITIONS, SearchRequest
from .table import ImageIndex, any_of


_BATCH = 8192  # rows that are decoded together
_RANK_OFFSET = 60  # of reciprocal rank fusion, as in LanceDB's RRFReranker


def search_quantized(index: ImageIndex, request: SearchRequest) -> list[dict[str, Any]]:
    """[`search`] in an index of int8 or binary embeddings.

    int8 embeddings are all compared with the query's. Binary ones are first compared by their signs, which the database does, then the best
    [`CANDIDATES`] for each result with the query's embedding itself. An approximate index is searched in its nearest [`PARTITIONS`] only, unless the request
    is exact.
    """
    query: Any  # the database's builders have no common type
    if index.precision == "int8":
        query = index.images.search().select(["path", "embedding"])
        query = query.where(request.where) if request.where else query
        batches = query.limit(None).to_batches(batch_size=_BATCH)
    else:
        (signs,) = index.quantization.encode(request.embedding[None])
        query = index.images.search(signs, vector_column_name="embedding")
        query = query.distance_type("hamming").select(["path", "embedding", "_distance"])
        query = query.bypass_vector_index() if request.exact else query.nprobes(PARTITIONS)
        query = query.where(request.where, prefilter=True) if request.where else query
        batches = query.limit(request.top * CANDIDATES).to_arrow().to_batches()
    scores = _best(batches, index.quantization, request.embedding, request.top)
    if request.words:
        query = index.images.search(request.words, query_type="fts").select(["path", "_score"])
        query = query.where(request.where, prefilter=True) if request.where else query
        named = [row["path"] for row in query.limit(request.top).to_list()]
        scores = _joined_ranks([list(scores), named], request.top)
    if not scores:
        return []
    columns = list(dict.fromkeys(["path", *request.columns]))
    rows = index.rows(index.images, columns, any_of("path", list(scores))).to_pylist()
    of_path = {row["path"]: row for row in rows}
    return [
        {name: of_path[path][name] for name in request.columns} | {"score": score} for path, score in scores.items()
    ]


def _best(
    batches: Iterable[pa.RecordBatch], quantization: Quantization, embedding: torch.Tensor, top: int
) -> dict[str, float]:
    """Paths and cosines of the `top` nearest, best first."""
    best: list[tuple[float, str]] = []
    for batch in batches:
        codes = batch["embedding"].flatten().to_numpy().reshape(len(batch), -1)
        cosines, places = (unit_length(quantization.decode(codes)) @ embedding).topk(min(top, len(batch)))
        best += zip(cosines.tolist(), batch["path"].take(pa.array(places.numpy())).to_pylist())
        best = sorted(best, reverse=True)[:top]
    return {path: cosine for cosine, path in best}


def _joined_ranks(orders: Sequence[Sequence[str]], top: int) -> dict[str, float]:
    scores: dict[str, float] = defaultdict(float)
    for order in orders:
        for rank, path in enumerate(order, 1):
            scores[path] += 1 / (rank + _RANK_OFFSET)
    return dict(sorted(scores.items(), key=lambda item: -item[1])[:top])
