"""Loading of pretrained image encoders and LLMs, and arguments that differ between the two."""

import os
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    SiglipModel,
)


TOWERS = ("vision_config", "text_config")


def of_tower(value: Any, tower: str) -> Any:
    return value.get(tower, value.get("")) if isinstance(value, dict) else value


def check_tower_keys(value: Any) -> None:
    if isinstance(value, dict) and (unknown := set(value) - {"", *TOWERS}):
        raise ValueError(f"Unknown tower {sorted(unknown)[0]!r}: the keys are {', '.join(TOWERS)}.")


def load_vision(
    vision: str | os.PathLike | PreTrainedModel, revision: str, dtype: Any, attn_implementation: str | None
) -> tuple[PreTrainedModel, nn.Linear | None, torch.Tensor | None]:
    """The image encoder, its projection and the logit scale, where the checkpoint has them."""
    if not isinstance(vision, PreTrainedModel):
        config = AutoConfig.from_pretrained(vision, revision=revision)
        # AutoModel would drop the projection of a CLIPVisionModelWithProjection without a word.
        projected = "CLIPVisionModelWithProjection" in (config.architectures or [])
        loader = CLIPVisionModelWithProjection if projected else AutoModel
        vision = loader.from_pretrained(
            vision, revision=revision, dtype=dtype, attn_implementation=attn_implementation
        )
    if isinstance(vision, CLIPModel):
        return vision.vision_model, vision.visual_projection, vision.logit_scale
    if isinstance(vision, CLIPVisionModelWithProjection):
        return vision.vision_model, vision.visual_projection, None
    if isinstance(vision, SiglipModel):
        return vision.vision_model, None, vision.logit_scale
    return vision, None, None


def load_text(name_or_path: str, revision: str | None, dtype: Any, attn_implementation: str | None, **kwargs: Any):
    download_kwargs = {key: value for key, value in kwargs.items() if key != "device_map"}
    config = AutoConfig.from_pretrained(name_or_path, revision=revision or "main", **download_kwargs)
    config = config.get_text_config()
    config.is_causal = False
    return AutoModel.from_pretrained(
        name_or_path,
        config=config,
        revision=revision or "main",
        dtype=dtype,
        attn_implementation=attn_implementation,
        **kwargs,
    )
