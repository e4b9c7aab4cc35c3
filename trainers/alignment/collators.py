"""From dataset rows to batches: texts become stored embeddings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from modeling_proclip.images import BrokenImage
from trainers.data.captions import captions_of
from trainers.data.data_folder import LocalFiles
from trainers.data.images import decode_stored_image


IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")  # of `ProCLIPModel.get_image_features`


class InheritanceCollator:
    """Batches of stage 1: each text as embedded by both text encoders.

    Args:
        text_store: the LLM's embeddings; only `lookup(list[str]) -> (N, hidden_size)` is used.
        teacher_store: CLIP's own text embeddings; only `lookup(list[str]) -> (N, projection_dim)` is used.

    Returns:
        `{"llm_embeds": (batch_size, hidden_size), "teacher_embeds": (batch_size, projection_dim)}`, in the stores' dtypes. The teacher reads
        "teacher_text" in rows that have it, such as the original of a translated caption. The first of several captions is read, as in
        evaluation.

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
    """Batches of stage 2: images and the LLM's embeddings of their captions.

    Args:
        text_store: the LLM's embeddings; only `lookup(list[str]) -> (N, hidden_size)` is used.
        image_processor: a [`ProCLIPProcessor`] or an image processor of Transformers, for rows with "image"; not needed for rows with
            "pixel_values" and what else an image tower takes, such as SigLIP2's "pixel_attention_mask" and "spatial_shapes".

    Returns:
        `{"pixel_values": (batch_size, 3, height, width) float32, ..., "llm_embeds": (batch_size, hidden_size)}`, where `...` is what else
        the image processor makes. The first of several captions is read, as in evaluation.

    Raises:
        KeyError: If a text is not in the store; names it.
        ValueError: If a row has neither "pixel_values" nor "image", an image that cannot be decoded, or "image" without an image processor.
    """

    def __init__(self, text_store: Any, image_processor: Any = None):
        self.text_store, self.image_processor = text_store, image_processor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return {**self._image_inputs(rows), "llm_embeds": self.text_store.lookup(_texts(rows))}

    def _image_inputs(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if all("pixel_values" in row for row in rows):
            names = [name for name in IMAGE_INPUTS if name in rows[0]]
            inputs = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in names}
            return {**inputs, "pixel_values": inputs["pixel_values"].float()}
        if not all("image" in row for row in rows):
            raise ValueError(
                f'every row needs "pixel_values" (processed) or "image" (an image), but one has the columns {sorted(rows[0])}'
            )
        if self.image_processor is None:
            raise ValueError(
                'the rows hold images ("image"): pass processing_class=processor to the trainer, a ProCLIPProcessor or image processor'
            )
        images = [_decoded(row["image"], i) for i, row in enumerate(rows)]
        return image_inputs(self.image_processor(images=images, return_tensors="pt"))


def image_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a batch the image tower takes: `pixel_values`, and for some towers masks and shapes."""
    return {name: value for name, value in batch.items() if name in IMAGE_INPUTS}


def _decoded(image: Any, row: int) -> Any:
    """An image of mode "RGB"; arrays and tensors are left to the image processor."""
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return image
    try:
        return decode_stored_image(image, LocalFiles())
    except BrokenImage as error:
        raise ValueError(f"the image of row {row} of the batch cannot be read: {error}") from error


def _texts(rows: Sequence[Mapping[str, Any]], reader: str = "text") -> list[str]:
    return [captions_of(row, f"row {i} of the batch", reader)[0] for i, row in enumerate(rows)]
