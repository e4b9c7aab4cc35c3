"""Tiny random parts for the tests: towers, a model, a tokenizer, an image processor. Everything is seeded."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerBase,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from modeling_proclip import ProCLIPConfig, ProCLIPModel, ProCLIPProcessor
from tests.golden import GOLDEN_DIR


LLAMA_DIR = GOLDEN_DIR / "g5_text_pipeline_hf"  # a tiny Llama with Llama 3's special tokens: 32 dimensions, 420 tokens

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LLAMA3 = "<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
TEXT = {
    "vocab_size": 420,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 4,
    "pad_token_id": 4,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 16,
}
CLIP_TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": 48,
    "eos_token_id": 49,
    "pad_token_id": 49,
    "projection_size": 24,
}


def config(**overrides: Any) -> ProCLIPConfig:
    values = {"vision_config": VISION, "text_config": TEXT, "projection_dim": 16, "adapter_num_layers": 2}
    return ProCLIPConfig(**{**values, **overrides})


def model(**overrides: Any) -> ProCLIPModel:
    torch.manual_seed(0)
    return ProCLIPModel(config(**overrides)).eval()


def clip(seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    return CLIPModel(CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=16)).eval()


def siglip(seed: int = 0) -> SiglipModel:
    torch.manual_seed(seed)
    return SiglipModel(SiglipConfig(text_config=CLIP_TEXT, vision_config=VISION)).eval()


def naflex(seed: int = 0) -> Siglip2Model:
    """A SigLIP2 that keeps an image's aspect ratio: patches, with a mask and the shape of each image."""
    torch.manual_seed(seed)
    vision = {key: value for key, value in VISION.items() if key != "image_size"}
    return Siglip2Model(Siglip2Config(text_config=CLIP_TEXT, vision_config={**vision, "num_patches": 16})).eval()


def naflex_image_processor() -> Siglip2ImageProcessorPil:
    return Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)


def tokenizer(folder: str | Path = LLAMA_DIR) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def processor(images: Any = None, **kwargs: Any) -> ProCLIPProcessor:
    return ProCLIPProcessor(images or image_processor(), tokenizer(), **kwargs)


def inputs(num_texts: int = 3, num_images: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    """A left-padded batch of tokens, the pooling mask and pictures, as the processor would return them."""
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(5, 420, (num_texts, length), generator=generator),
        "attention_mask": torch.ones(num_texts, length, dtype=torch.long),
        "pixel_values": torch.randn(num_images, 3, 16, 16, generator=generator),
    }
    for row in range(num_texts):
        batch["attention_mask"][row, : row % 3] = 0
    batch["token_type_ids"] = batch["attention_mask"].clone()
    batch["token_type_ids"][:, : length // 2] = 0
    return batch


@torch.no_grad()
def assert_same_embeddings(one: torch.nn.Module, other: torch.nn.Module, tolerance: float = 0.0) -> None:
    """Both models give the same embeddings and logits to [`inputs`], within `tolerance`."""
    expected, actual = one(**inputs()), other(**inputs())
    for name in ("text_embeds", "image_embeds", "logits_per_image"):
        torch.testing.assert_close(actual[name], expected[name], atol=tolerance, rtol=0)
