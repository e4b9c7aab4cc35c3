"""SigLIP's and SigLIP2's vision tower in timm's layout (`visual.trunk`, ...), with attention pooling."""

from collections.abc import Mapping

import torch
from transformers import SiglipVisionConfig

from .errors import ConversionError
from .positions import positions_rule
from .rules import Options, Rule, Rules, Tower, affine, build_config, chunk, shape_of, vit_sizes
from .stored_tensors import StoredTensor


TRUNK = "visual.trunk."
SO400M_WIDTH, SO400M_HEAD_WIDTH = 1152, 72


def convert_siglip(tensors: Mapping[str, StoredTensor], options: Options) -> Tower:
    """The tower of the `.pt` files with SigLIP2. Its pooled image is the embedding: it has no projection."""
    if options.quick_gelu:
        raise ConversionError("SigLIP's towers have no QuickGELU: leave quick_gelu out.")
    # 64 divides the width of So400m too, and would give a model that runs and is wrong.
    width = shape_of(tensors, f"{TRUNK}patch_embed.proj.weight", 4)[0]
    so400m = width == SO400M_WIDTH and options.head_width == 64
    sizes = vit_sizes(
        tensors,
        options,
        patches=f"{TRUNK}patch_embed.proj.weight",
        positions=f"{TRUNK}pos_embed",
        positions_dims=3,
        leading=0,
        layers=f"{TRUNK}blocks.",
        mlp="mlp.fc1.weight",
        head_width=SO400M_HEAD_WIDTH if so400m else options.head_width,
    )
    # SigLIP was trained with the tanh form of GELU, but timm's So400m of 224 pixels, which the published checkpoints were trained and run in,
    # has the exact one, and so have the recorded outputs.
    config = build_config(SiglipVisionConfig, **sizes.config_values, hidden_act="gelu", layer_norm_eps=1e-6)
    ours, pool = "vision_model.", f"{TRUNK}attn_pool."
    rules: Rules = {
        f"{ours}embeddings.position_embedding.weight": Rule(
            (f"{TRUNK}pos_embed",), positions_rule(sizes.grid, leading=0, antialias=True)
        ),
        **affine(f"{ours}embeddings.patch_embedding", f"{TRUNK}patch_embed.proj"),
        **affine(f"{ours}post_layernorm", f"{TRUNK}norm"),
        f"{ours}head.probe": Rule((f"{pool}latent",)),
        **affine(f"{ours}head.attention.out_proj", f"{pool}proj"),
        **affine(f"{ours}head.layernorm", f"{pool}norm"),
        **affine(f"{ours}head.mlp.fc1", f"{pool}mlp.fc1"),
        **affine(f"{ours}head.mlp.fc2", f"{pool}mlp.fc2"),
    }
    for kind in ("weight", "bias"):
        rules[f"{ours}head.attention.in_proj_{kind}"] = Rule((f"{pool}q.{kind}", f"{pool}kv.{kind}"), _join)
    for i in range(config.num_hidden_layers):
        layer, published = f"{ours}encoder.layers.{i}.", f"{TRUNK}blocks.{i}."
        for kind in ("weight", "bias"):
            for part, name in enumerate("qkv"):
                rules[f"{layer}self_attn.{name}_proj.{kind}"] = Rule((f"{published}attn.qkv.{kind}",), chunk(part, 3))
        rules |= affine(f"{layer}self_attn.out_proj", f"{published}attn.proj")
        rules |= affine(f"{layer}layer_norm1", f"{published}norm1") | affine(
            f"{layer}layer_norm2", f"{published}norm2"
        )
        rules |= affine(f"{layer}mlp.fc1", f"{published}mlp.fc1") | affine(f"{layer}mlp.fc2", f"{published}mlp.fc2")
    notes = [f"Heads are {SO400M_HEAD_WIDTH} wide, as in SigLIP's So400m of this width."] if so400m else []
    if "logit_bias" in tensors:
        notes.append("logit_bias, which shifts all logits of the sigmoid loss alike, is left out.")
    return Tower("SigLIP ViT (attention pooling)", config, rules, None, ignored=("logit_bias",), notes=notes)


def _join(query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
    return torch.cat([query, key_value])
