"""What an index is searched by, whatever its embeddings are rounded to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


# How many of an approximate index's partitions are searched, and how many candidates are compared exactly for each result.
PARTITIONS, CANDIDATES = 50, 10


@dataclass(frozen=True)
class SearchRequest:
    """One search. See [`search`] for what its parts mean.

    Args:
        embedding: `(index.dim,)` float32, of unit length.
        top: number of results.
        where: SQL condition.
        words: words of captions and file names.
        columns: columns of the results.
        exact: whether to compare with every embedding.
    """

    embedding: torch.Tensor
    top: int
    where: str | None
    words: str | None
    columns: Sequence[str]
    exact: bool
