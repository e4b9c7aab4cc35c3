"""Embeddings as an index stores them: shorter, or in a byte or a bit a dimension."""

from dataclasses import dataclass
from typing import Any

import torch

from trainers.compute.precision import unit_length
from trainers.compute.quantization import Precision, Quantization

from .tasks import Outcome, Task


@dataclass(frozen=True)
class StoredEmbeddings:
    """What is kept of the embeddings before they are scored. Images are stored and texts are questions, as in `proclip index`: texts are cut too,
    but stay in float32.

    Args:
        truncate_dim: the first so many dimensions, brought to unit length; None for all.
        precision: of the images, see [`Quantization`]; the ranges of int8 are those of the benchmark's images.
    """

    truncate_dim: int | None = None
    precision: Precision = "float32"

    @property
    def whole(self) -> bool:
        """Whether embeddings stay as they are."""
        return self.truncate_dim is None and self.precision == "float32"

    def protocol(self) -> dict[str, Any]:
        """For the results; empty where nothing is changed."""
        return {} if self.whole else {"truncate_dim": self.truncate_dim, "precision": self.precision}

    def score(
        self, task: Task, images: torch.Tensor | None, texts: torch.Tensor | None
    ) -> tuple[Outcome, torch.Tensor | None, torch.Tensor | None]:
        """The outcome of `task`, and the embeddings that it is of. Where they are changed, its details have "embedding": their size, and the
        metrics of whole ones.

        Args:
            images, texts: `(N, p)` float32, of any length, or None where the task has none.
        """
        outcome = task.score(images, texts)  # type: ignore[misc]  # only CKA has none
        if self.whole or images is None:  # texts before the adapter are no embeddings that an index stores
            return outcome, images, texts
        prefixes = unit_length(images[:, : self.truncate_dim])
        stored = Quantization.calibrated(self.precision, prefixes)
        kept = stored.decode(stored.encode(prefixes))
        questions = None if texts is None else unit_length(texts[:, : self.truncate_dim])
        changed = task.score(kept, questions)  # type: ignore[misc]
        changed.details["embedding"] = {
            "dim": stored.dim,
            "precision": self.precision,
            "bytes": stored.num_bytes,
            "whole": {"dim": images.shape[1], "bytes": 4 * images.shape[1], "metrics": outcome.metrics},
        }
        return changed, kept, questions


WHOLE = StoredEmbeddings()
