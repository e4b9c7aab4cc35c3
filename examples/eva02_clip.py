"""Make Transformers folders of EVA-CLIP's own EVA02-CLIP-L/14: what the `proclip-eva02-l-14-*` recipes start from.

    python examples/eva02_clip.py EVA02_CLIP_L_psz14_s4B.pt models

The file is in the Hub repository `QuanSun/EVA-CLIP`. `models/eva02-clip-l-14` gets the image encoder, as a ProCLIP checkpoint whose adapter is
fresh, and `models/eva02-clip-l-14-text` the text encoder, as a CLIPModel whose vision side is of no use: it teaches stage 1. The file itself
was not at hand: the layouts are those that the published code builds, and a file that differs is refused by the name of a tensor.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, LlamaConfig

from modeling_proclip import ProCLIPConfig, ProCLIPModel
from modeling_proclip.conversion import ConversionError
from modeling_proclip.conversion.convert_eva_to_hf import convert_eva
from modeling_proclip.conversion.rules import Options, count_layers, shape_of
from modeling_proclip.conversion.stored_tensors import StoredTensor, read_tensors


BLOCKS = "text.transformer.resblocks."
# Transformers' names of what is in every block, and OpenCLIP's.
IN_A_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def vision_model(tensors: Mapping[str, StoredTensor], options: Options) -> ProCLIPModel:
    """The image encoder with its projection and logit scale, beside a fresh adapter and no LLM."""
    tower = convert_eva(tensors, options)
    # A lean checkpoint never builds its LLM from this, and this one's adapter is not to be used.
    llm = LlamaConfig(hidden_size=8, num_attention_heads=1, num_key_value_heads=1)
    config = ProCLIPConfig(
        vision_config=tower.config,
        text_config=llm,
        projection_dim=tower.projection_dim,
        vision_projection_bias=tower.projection_bias,
        lean=True,
    )
    model = ProCLIPModel(config, load_text_model=False)
    state = {name: rule.transform(*(_read(tensors, n) for n in rule.sources)) for name, rule in tower.rules.items()}
    missing, unexpected = model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    missing = [name for name in missing if not name.startswith(("text_adapter.", "logit_scale"))]
    if missing or unexpected:
        raise ConversionError(f"the image encoder lacks {missing[:3]} or has {unexpected[:3]} too much")
    model.logit_scale.data.fill_(_read(tensors, "logit_scale").item())
    return model


def text_model(tensors: Mapping[str, StoredTensor], num_heads: int) -> CLIPModel:
    """The text encoder: OpenCLIP's, with exact GELU and the end of the text pooled."""
    vocab_size, width = shape_of(tensors, "text.token_embedding.weight", 2)
    num_layers = count_layers(tensors, BLOCKS)
    projection_dim = shape_of(tensors, "text.text_projection", 2)[1]
    text = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shape_of(tensors, f"{BLOCKS}0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "max_position_embeddings": shape_of(tensors, "text.positional_embedding", 2)[0],
        "hidden_act": "gelu",
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": 0,
    }
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 8, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection_dim))
    state = {
        "text_model.embeddings.token_embedding.weight": _read(tensors, "text.token_embedding.weight"),
        "text_model.embeddings.position_embedding.weight": _read(tensors, "text.positional_embedding"),
        "text_model.final_layer_norm.weight": _read(tensors, "text.ln_final.weight"),
        "text_model.final_layer_norm.bias": _read(tensors, "text.ln_final.bias"),
        "text_projection.weight": _read(tensors, "text.text_projection").T,
    }
    for i in range(num_layers):
        for kind in ("weight", "bias"):
            for ours, theirs in IN_A_BLOCK.items():
                state[f"text_model.encoder.layers.{i}.{ours}.{kind}"] = _read(tensors, f"{BLOCKS}{i}.{theirs}.{kind}")
            fused = _read(tensors, f"{BLOCKS}{i}.attn.in_proj_{kind}")
            for name, part in zip("qkv", fused.chunk(3), strict=True):
                state[f"text_model.encoder.layers.{i}.self_attn.{name}_proj.{kind}"] = part
    known = set(model.state_dict())
    state = {name: tensor.float().contiguous() for name, tensor in state.items()}
    missing = [name for name in known if re.match(r"text_(model|projection)\.", name) and name not in state]
    if missing or not state.keys() <= known:
        raise ConversionError(
            f"the text encoder lacks {missing[:3]} or has {sorted(state.keys() - known)[:3]} too much"
        )
    model.load_state_dict(state, strict=False)
    return model.eval()


def _read(tensors: Mapping[str, StoredTensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise ConversionError(f"there is no tensor {name!r} in this file: it is not EVA02-CLIP's")
    return tensors[name].read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="EVA02_CLIP_L_psz14_s4B.pt")
    parser.add_argument("output", type=Path, help="folder that gets eva02-clip-l-14/ and eva02-clip-l-14-text/")
    parser.add_argument("--tokenizer", default="openai/clip-vit-large-patch14", help="folder or Hub name of CLIP's")
    args = parser.parse_args()
    tensors = read_tensors(args.checkpoint)
    vision, text = vision_model(tensors, Options()), text_model(tensors, num_heads=12)
    vision.save_pretrained(args.output / "eva02-clip-l-14", lean=True)
    size = vision.config.vision_config.image_size
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        args.output / "eva02-clip-l-14"
    )
    text.save_pretrained(args.output / "eva02-clip-l-14-text")
    AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(args.output / "eva02-clip-l-14-text")
    print(f"{args.output}: eva02-clip-l-14, {size} x {size} pixels, and eva02-clip-l-14-text")


if __name__ == "__main__":
    main()
