"""Tiny random text encoders for the tests of the text store."""

import json

import torch
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipModel,
)

from modeling_proclip import ProCLIPConfig, ProCLIPModel, ProCLIPProcessor
from tests.golden import GOLDEN_DIR


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
WORDS = "a the of red blue fox boat house river two three with on under photo drawing very long quiet Übung 狐狸 🦊".split()


def make_texts(count: int, longest: int = 30, seed: int = 0) -> list[str]:
    """Different texts of mixed length: each begins with its number."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (count,), generator=generator).tolist()
    return [
        " ".join([str(number), *(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))])
        for number, length in enumerate(lengths)
    ]


def tiny_proclip(max_length: int = 64, seed: int = 0, template: str | None = None, **config):
    """A random ProCLIPModel over a two-layer Llama of 32 dimensions, and its processor."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN_DIR / "g5_text_pipeline_hf")
    llama = {
        "model_type": "llama",
        "vocab_size": 420,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(seed)
    vision = {"model_type": "clip_vision_model", **VISION}
    model = ProCLIPModel(ProCLIPConfig(vision_config=vision, text_config=llama, projection_dim=16, **config))
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    template = "<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>" if template is None else template
    return model.eval(), ProCLIPProcessor(image_processor, tokenizer, prompt_template=template, max_length=max_length)


def tiny_clip(family: str = "clip", context: int = 48):
    """A random CLIPModel or SiglipModel of 16 dimensions, and its tokenizer."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    empty = CLIPTokenizer(vocab={token: i for i, token in enumerate(special)}, merges=[])
    trained = empty.train_new_from_iterator(make_texts(50), 400, show_progress=False, end_of_word_suffix="</w>")
    # Training numbers the single characters in another order each time, and so would other tokens get other embeddings.
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    tokens = special + sorted(model["vocab"].keys() - special)
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": context,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    if family == "siglip":
        return SiglipModel(
            SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=VISION)
        ).eval(), tokenizer
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)).eval(), tokenizer
