"""From dataset rows to batches: texts become stored embeddings."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trainers.data.captions import captions_of


class InheritanceCollator:
    """
    Batches of stage 1: each text as both text encoders see it.

    Args:
        text_store: the LLM's embeddings; only `lookup(list[str]) -> (N, hidden_size)` is used.
        teacher_store: CLIP's own text embeddings; only `lookup(list[str]) -> (N, projection_dim)` is used.

    Returns:
        `{"llm_embeds": (batch_size, hidden_size), "teacher_embeds": (batch_size, projection_dim)}`, in the stores' dtypes. The teacher reads
        "teacher_text" in rows that have it: of a translation, the caption that it translates. A row with several captions is read by its
        first one, which is what evaluation does.

    Raises:
        KeyError: If a text is not in a store; names it.
    """

    def __init__(self, text_store: Any, teacher_store: Any):
        self.text_store, self.teacher_store = text_store, teacher_store

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "llm_embeds": self.text_store.lookup(_texts(rows)),
            "teacher_embeds": self.teacher_store.lookup(_texts(rows, "teacher_text")),
        }


class ContrastiveTuningCollator:
    """
    Batches of stage 2: pictures and the LLM's embeddings of their captions.

    Args:
        text_store: the LLM's embeddings; only `lookup(list[str]) -> (N, hidden_size)` is used.
        image_processor: a [`ProCLIPProcessor`] or an image processor of Transformers, for rows with "image"; not needed for rows with
            "pixel_values".

    Returns:
        `{"pixel_values": (batch_size, 3, height, width) float32, "llm_embeds": (batch_size, hidden_size)}`. A row with several captions
        is read by its first one, which is what evaluation does.

    Raises:
        KeyError: If a text is not in the store; names it.
        ValueError: If a row has neither "pixel_values" nor "image", or "image" without an image processor.
    """

    def __init__(self, text_store: Any, image_processor: Any = None):
        self.text_store, self.image_processor = text_store, image_processor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return {"pixel_values": self._pixel_values(rows), "llm_embeds": self.text_store.lookup(_texts(rows))}

    def _pixel_values(self, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        if all("pixel_values" in row for row in rows):
            return torch.stack([torch.as_tensor(row["pixel_values"], dtype=torch.float32) for row in rows])
        if not all("image" in row for row in rows):
            raise ValueError(
                f'every row needs "pixel_values" (processed) or "image" (a picture), but one has the columns {sorted(rows[0])}'
            )
        if self.image_processor is None:
            raise ValueError(
                'the rows hold pictures ("image"): pass processing_class=processor to the trainer, a ProCLIPProcessor or image processor'
            )
        return self.image_processor(images=[row["image"] for row in rows], return_tensors="pt")["pixel_values"]


def _texts(rows: Sequence[Mapping[str, Any]], reader: str = "text") -> list[str]:
    return [captions_of(row, f"row {i} of the batch", reader)[0] for i, row in enumerate(rows)]
