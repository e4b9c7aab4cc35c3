"""What a converted checkpoint needs beside its weights: an image processor, and the LLM's config and tokenizer."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig, SiglipVisionConfig
from transformers.image_utils import PILImageResampling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from ..identity import load_llm_config, weights_sha256
from ..processing_proclip import ProCLIPProcessor
from .errors import ConversionError, first_line


@dataclass(frozen=True)
class TextModel:
    """The LLM of a lean checkpoint: what the config keeps of it, its tokenizer, and a line for people."""

    config_values: dict[str, Any]
    tokenizer: Any
    description: str


def vision_processor_for(config: PreTrainedConfig, name_or_path: str | os.PathLike | None) -> Any:
    """The image processor of a tower: the one named, or CLIP's mean and deviation with resizing and centre crop for OpenAI's and EVA's towers, and SigLIP2's
    own (mean and deviation 0.5, both sides resized, bilinear).
    """
    size = config.image_size
    if name_or_path is None:
        square = {"height": size, "width": size}
        if isinstance(config, SiglipVisionConfig):
            return SiglipImageProcessorPil(size=square, resample=PILImageResampling.BILINEAR)
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ConversionError(f"The image processor {name_or_path} cannot be loaded: {first_line(error)}") from error
    made = processor(Image.new("RGB", (2 * size, size)), return_tensors="pt")["pixel_values"].shape[-2:]
    if tuple(made) != (size, size):
        raise ConversionError(
            f"The image processor {name_or_path} makes images of {tuple(made)} pixels, and the tower takes {(size, size)}."
        )
    return processor


def load_text_model(name_or_path: str | os.PathLike, revision: str | None, llm_size: int) -> TextModel:
    """Read the config and the tokenizer of an LLM, whose embeddings must be of `llm_size`, and hash its weights; the model itself is not loaded."""
    local = os.path.isdir(name_or_path)
    if local and revision is not None:
        raise ConversionError(
            f"text_model_revision is for an LLM on the Hub, and {name_or_path} is a folder: leave it out."
        )
    name = str(Path(name_or_path).resolve()) if local else os.fspath(name_or_path)
    try:
        config = load_llm_config(name, revision)
        if config.hidden_size != llm_size:
            raise ConversionError(
                f"{name_or_path} has embeddings of {config.hidden_size}, and the text adapter takes {llm_size}: it belongs to another LLM."
            )
        commit = None if local else config._commit_hash
        tokenizer = AutoTokenizer.from_pretrained(name, revision=commit or "main", trust_remote_code=False)
        digest = weights_sha256(name, commit)
    except ConversionError:
        raise
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConversionError(f"The LLM {name_or_path} cannot be read: {first_line(error)}") from error
    values = {
        "text_config": config,
        "text_model_name_or_path": name,
        "text_model_revision": commit,
        "text_model_sha256": digest,
    }
    return TextModel(values, tokenizer, f"{name} (SHA-256 of its weights {digest[:12]}...)")


def make_processor(image_processor: Any, tokenizer: Any, prompt_template: str | None) -> Any:
    """A [`ProCLIPProcessor`], or the image processor alone where no LLM is named."""
    if tokenizer is None:
        if prompt_template is not None:
            raise ConversionError("prompt_template is for the tokenizer of an LLM: name the LLM with text_model.")
        return image_processor
    try:
        return ProCLIPProcessor(image_processor, tokenizer, prompt_template=prompt_template)
    except ValueError as error:
        raise ConversionError(str(error)) from error
