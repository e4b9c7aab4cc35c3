"""The two sides of a model, each as a module with tensors in and one tensor out, which is what can be exported."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from trainers.compute.precision import unit_length


# Texts of different scripts and lengths, on which an exported side is compared with the model. The longest is cut to what the model reads.
_TEXTS = (
    "a red fox",
    "",
    "两只狗",
    "Zwei Kinder bauen am Strand eine Sandburg, während ein Hund zusieht.",
    "A crowded market at dusk, seen from above, with lanterns over every stall and rain on the roofs. " * 8,
)
_BATCH = torch.export.Dim("batch_size")


class ImageSide(nn.Module):
    """The image encoder and its projection: `pixel_values` `(batch_size, 3, height, width)` to `image_embeds` `(batch_size, projection_dim)`.

    Embeddings are of unit length, in float32.
    """

    name: Literal["image"] = "image"
    input_names = ("pixel_values",)
    output_name = "image_embeds"
    dynamic_shapes = {"pixel_values": {0: _BATCH}}

    def __init__(self, model: ProCLIPModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch_size, 3, height, width)` to `(batch_size, projection_dim)`."""
        return unit_length(self.model.get_image_features(pixel_values=pixel_values).pooler_output)


class TextSide(nn.Module):
    """The LLM, the pooling and the adapter: tokens to `text_embeds` `(batch_size, projection_dim)`.

    `input_ids`, `attention_mask` and `token_type_ids` are `(batch_size, sequence_length)`, int64, as [`ProCLIPProcessor`] returns them.
    Embeddings are of unit length, in float32.
    """

    name: Literal["text"] = "text"
    input_names = ("input_ids", "attention_mask", "token_type_ids")
    output_name = "text_embeds"
    dynamic_shapes = {name: {0: _BATCH, 1: torch.export.Dim("sequence_length")} for name in input_names}

    def __init__(self, model: ProCLIPModel):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """Three of `(batch_size, sequence_length)` to `(batch_size, projection_dim)`."""
        features = self.model.get_text_features(input_ids, attention_mask, token_type_ids)
        return unit_length(features.pooler_output)


Side = ImageSide | TextSide


def export_program(side: Side, processor: ProCLIPProcessor) -> torch.export.ExportedProgram:
    """`torch.export` of one side, with a batch size and a text length that may change from call to call.

    Args:
        side: of a model on the CPU, in eval mode.
        processor: the model's.

    Raises:
        ValueError: If the images have other inputs than `pixel_values`, or `torch.export` cannot follow the model; says which side.
    """
    (example, *_) = examples(side, processor)
    try:
        with torch.no_grad():
            return torch.export.export(side, (), example, dynamic_shapes=side.dynamic_shapes)
    except Exception as error:  # what a model's code does that torch.export cannot follow ends in errors of many kinds
        reason = next(iter(str(error).splitlines()), "")
        tower = side.model.vision_model if isinstance(side, ImageSide) else side.model.text_model
        raise ValueError(
            f"the {side.name} side ({type(tower).__name__}) cannot be exported: {type(error).__name__}: {reason}"
        ) from error


def examples(side: Side, processor: ProCLIPProcessor) -> list[dict[str, torch.Tensor]]:
    """Three batches of inputs, of different sizes and lengths: the first is for tracing, the others are for comparing.

    Raises:
        ValueError: If the image processor gives more than `pixel_values`.
    """
    if isinstance(side, TextSide):
        return [_tokens(processor, _TEXTS[:3]), _tokens(processor, _TEXTS), _tokens(processor, _TEXTS[1:2])]
    if (names := processor.image_processor.model_input_names) != ["pixel_values"]:
        raise ValueError(
            f"the image side cannot be exported: its inputs are {', '.join(names)}, and only an encoder that takes images of one size, as "
            "pixel_values alone, has a fixed graph"
        )
    images = [_noise(seed) for seed in range(5)]
    return [dict(processor(images=some, return_tensors="pt")) for some in (images[:3], images, images[:1])]


def _tokens(processor: ProCLIPProcessor, texts: Sequence[str]) -> dict[str, Any]:
    tokens = processor.tokenizer(list(texts), return_tensors="pt", **processor.text_kwargs)
    return {name: tokens[name] for name in TextSide.input_names}


def _noise(seed: int) -> Image.Image:
    values = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.numpy()).resize((256, 256))
