"""Retrieval on a held-out set while stage 2 trains: among all images and all captions, each once, of all processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trainers.base.distributed import gather_with_grad
from trainers.data.captions import captions_of
from trainers.evaluation import retrieval_recall


class AllCaptionsCollator:
    """Batches of `collator`, which reads the first caption of a row, with the stored embeddings of all captions: "caption_embeds"
    `(num_captions, hidden_size)`, row by row, and "num_captions" `(batch_size,)`.
    """

    def __init__(self, collator: Any, text_store: Any):
        self.collator, self.text_store = collator, text_store

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        captions = [captions_of(row, f"row {i} of the batch") for i, row in enumerate(rows)]
        return {
            **self.collator(rows),
            "caption_embeds": self.text_store.lookup([caption for of_row in captions for caption in of_row]),
            "num_captions": torch.tensor([len(of_row) for of_row in captions]),
        }


class HeldOutRetrieval:
    """Collects the embeddings of an evaluation, batch by batch, on the CPU."""

    def __init__(self):
        self._batches: list[tuple[torch.Tensor, ...]] = []

    def add(self, images: torch.Tensor, captions: torch.Tensor, num_captions: torch.Tensor) -> None:
        """Images `(rows, dim)`, their captions `(sum(num_captions), dim)` and how many each has `(rows,)`; a process may have no rows."""
        self._batches.append((images.cpu(), captions.cpu(), num_captions.cpu()))

    def recall(self, device: torch.device) -> dict[str, float]:
        """[`retrieval_recall`] at 1, 5 and 10 among what all processes have added since the last call; empty if nothing was added."""
        if not self._batches:
            return {}
        sides = [torch.cat(side).to(device) for side in zip(*self._batches, strict=True)]
        self._batches = []
        with torch.no_grad():
            images, captions, num_captions = (gather_with_grad(side) for side in sides)
        of_image = torch.arange(len(images), device=device).repeat_interleave(num_captions)
        return retrieval_recall(images, captions, of_image)
