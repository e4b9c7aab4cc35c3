"""From dataset rows to batches: which caption a row shows in an epoch, and how texts become stored embeddings."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset

from .epochs import EpochDataset


class DrawnCaptions(EpochDataset):
    """
    Rows whose "text" is one caption: of a list of captions, one is drawn a row and epoch (ProCLIP, arXiv 2510.18795, Table 8: "one
    drawn at random per sample per epoch"; the published code draws without a seed). The draw is a function of seed, epoch and row alone, so
    a resumed run and a run with another number of processes or data workers sees the same captions.

    Args:
        rows: the dataset: `len(rows)` rows by number, each a mapping with "text", a string or a list of captions.
        seed: of the draw.

    Raises:
        ValueError: If the dataset has no rows by number (a stream), or, when it is read, if a row has no caption.
    """

    def __init__(self, rows: Any, seed: int):
        if isinstance(rows, IterableDataset):
            raise ValueError(
                f"the dataset is a stream ({type(rows).__name__}), which has no row numbers: open it by trainers.data.open_pairs with "
                "PairSource(..., streaming=True), whose streams can be shared by processes and resumed, or pass a dataset with len() and [i]"
            )
        super().__init__()
        self.rows, self.seed = rows, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.rows[index])
        row["text"] = draw_caption(captions_of(row, f"row {index}"), self.seed, self.epoch, index)
        return row


def draw_caption(captions: Sequence[str], seed: int, epoch: int, row: int | str) -> str:
    """One of `captions`, drawn by seed, epoch and what tells the row from others (ProCLIP, arXiv 2510.18795, Table 8)."""
    if len(captions) == 1:
        return captions[0]
    # Seeded by a string, whose hash mixes all three: neighbouring rows and epochs draw independently.
    return random.Random(f"{seed} {epoch} {row}").choice(captions)


class InheritanceCollator:
    """
    Batches of stage 1: each text as both text encoders see it.

    Args:
        text_store: the LLM's embeddings; only `lookup(list[str]) -> (N, hidden_size)` is used.
        teacher_store: CLIP's own text embeddings; only `lookup(list[str]) -> (N, projection_dim)` is used.

    Returns:
        `{"llm_embeds": (batch_size, hidden_size), "teacher_embeds": (batch_size, projection_dim)}`, in the stores' dtypes. A row with
        several captions is read by its first one, which is what evaluation does.

    Raises:
        KeyError: If a text is not in a store; names it.
    """

    def __init__(self, text_store: Any, teacher_store: Any):
        self.text_store, self.teacher_store = text_store, teacher_store

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        texts = _texts(rows)
        return {"llm_embeds": self.text_store.lookup(texts), "teacher_embeds": self.teacher_store.lookup(texts)}


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


def captions_of(row: Mapping[str, Any], name: str) -> list[str]:
    """
    The captions of a row, at least one.

    Raises:
        ValueError: If the row has no column "text" or an empty list there; calls the row `name`.
    """
    if "text" not in row:
        raise ValueError(f'{name} has no column "text", only {sorted(row)}: rename the column that holds the captions')
    captions = [row["text"]] if isinstance(row["text"], str) else list(row["text"])
    if not captions:
        raise ValueError(f'{name} has an empty list of captions in "text": leave such rows out')
    return captions


def _texts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [captions_of(row, f"row {i} of the batch")[0] for i, row in enumerate(rows)]
