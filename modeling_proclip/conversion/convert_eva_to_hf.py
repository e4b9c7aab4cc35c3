"""EVA-CLIP's vision tower (`visual.blocks`, ...): EVA02 with rotary positions, SwiGLU and sub-layer norms, and EVA01 with layer scale."""

from collections.abc import Mapping

import torch

from ..configuration_eva_clip import EvaCLIPVisionConfig
from ..modeling_eva_clip import rotary_tables
from .errors import ConversionError
from .positions import positions_rule, resize_patches
from .rules import Options, Rule, Rules, Tower, affine, build_config, chunk, shape_of, vit_sizes
from .stored_tensors import StoredTensor


BLOCKS = "visual.blocks."
TABLE = "visual.rope.freqs_sin"
TABLES = r"visual\.(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)"


def convert_eva(tensors: Mapping[str, StoredTensor], options: Options) -> Tower:
    """The tower of ProCLIP's and LLM2CLIP's `.pt` files with EVA-CLIP."""
    if options.quick_gelu:
        raise ConversionError("EVA's towers have no QuickGELU: leave quick_gelu out.")
    gated = f"{BLOCKS}0.mlp.w1.weight" in tensors
    # Files without the tables are EVA02's too: its code can drop them, and no published EVA with SwiGLU goes without rotary positions.
    rotary = gated or TABLE in tensors
    if options.rope_pretrained_grid != Options.rope_pretrained_grid and not rotary:
        raise ConversionError("rope_pretrained_grid is for the rotary positions of EVA02, and this EVA01 has none.")
    fused = f"{BLOCKS}0.attn.qkv.weight" in tensors
    scaled, sub_norms = f"{BLOCKS}0.gamma_1" in tensors, f"{BLOCKS}0.attn.inner_attn_ln.weight" in tensors
    sizes = vit_sizes(
        tensors,
        options,
        patches="visual.patch_embed.proj.weight",
        positions="visual.pos_embed",
        positions_dims=3,
        leading=1,
        layers=BLOCKS,
        mlp="mlp.w1.weight" if gated else "mlp.fc1.weight",
        head_width=options.head_width,
    )
    config = build_config(
        EvaCLIPVisionConfig,
        **sizes.config_values,
        qkv_bias=any(f"{BLOCKS}0.attn.{name}" in tensors for name in ("q_bias", "q_proj.bias")),
        gated_mlp=gated,
        sub_layer_norm=sub_norms,
        layer_scale_init_value=0.1 if scaled else None,
        rope_pretrained_grid=options.rope_pretrained_grid if rotary else None,
    )
    notes = [] if not rotary else _check_tables(tensors, config, sizes.stored_grid)
    ours = "vision_model."
    rules: Rules = {
        f"{ours}embeddings.class_embedding": Rule(("visual.cls_token",), lambda tensor: tensor.flatten()),
        f"{ours}embeddings.position_embedding": Rule(("visual.pos_embed",), positions_rule(sizes.grid, leading=1)),
        f"{ours}embeddings.patch_embedding.weight": Rule(
            ("visual.patch_embed.proj.weight",), lambda tensor: resize_patches(tensor, config.patch_size)
        ),
        f"{ours}embeddings.patch_embedding.bias": Rule(("visual.patch_embed.proj.bias",)),
        **affine(f"{ours}layer_norm", "visual.norm"),
        **affine("visual_projection", "visual.head"),
    }
    for i in range(config.num_hidden_layers):
        rules |= _block(f"{ours}layers.{i}.", f"{BLOCKS}{i}.", config, fused)
    return Tower(
        title="EVA02 ViT (rotary positions, SwiGLU)" if gated else "EVA01 ViT",
        config=config,
        rules=rules,
        projection_dim=shape_of(tensors, "visual.head.weight", 2)[0],
        projection_bias=True,
        ignored=(TABLES,),
        notes=notes,
    )


def _block(ours: str, published: str, config: EvaCLIPVisionConfig, fused: bool) -> Rules:
    attention = f"{published}attn."
    rules = affine(f"{ours}layer_norm1", f"{published}norm1") | affine(f"{ours}layer_norm2", f"{published}norm2")
    rules |= affine(f"{ours}self_attn.out_proj", f"{attention}proj")
    for part, name in enumerate("qkv"):
        project = f"{ours}self_attn.{name}_proj."
        fused_rule = Rule((f"{attention}qkv.weight",), chunk(part, 3))
        rules[f"{project}weight"] = fused_rule if fused else Rule((f"{attention}{name}_proj.weight",))
        if config.qkv_bias and name != "k":
            rules[f"{project}bias"] = Rule((f"{attention}{name}_bias" if fused else f"{attention}{name}_proj.bias",))
    if config.sub_layer_norm:
        rules |= affine(f"{ours}self_attn.layer_norm", f"{attention}inner_attn_ln")
        rules |= affine(f"{ours}mlp.layer_norm", f"{published}mlp.ffn_ln")
    names = (
        {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if config.gated_mlp else {"fc1": "fc1", "fc2": "fc2"}
    )
    for name, theirs in names.items():
        rules |= affine(f"{ours}mlp.{name}", f"{published}mlp.{theirs}")
    if config.layer_scale_init_value is not None:
        rules |= {f"{ours}layer_scale{k}": Rule((f"{published}gamma_{k}",)) for k in (1, 2)}
    return rules


def _check_tables(tensors: Mapping[str, StoredTensor], config: EvaCLIPVisionConfig, stored_grid: int) -> list[str]:
    """Compare the rotary tables that the file may hold with those that we compute: a wrong grid would go unnoticed."""
    if TABLE not in tensors:
        return [
            f"The file holds no rotary tables: positions are taken as made for {config.rope_pretrained_grid} patches a side."
        ]
    stored = tensors[TABLE].read().float()
    head_width = config.hidden_size // config.num_attention_heads
    for grid in (config.rope_pretrained_grid, *range(1, 65)):
        expected = rotary_tables(stored_grid, head_width, grid)[1]
        if stored.shape != expected.shape:
            raise ConversionError(
                f"{tensors[TABLE].file}: tensor {TABLE!r} of shape {tuple(stored.shape)} should be {tuple(expected.shape)}: pass "
                "another head_width."
            )
        if torch.allclose(stored, expected, atol=2e-2):
            if grid == config.rope_pretrained_grid:
                return []
            raise ConversionError(
                f"{tensors[TABLE].file}: its rotary positions ({TABLE!r}) were made for a grid of {grid}, not of "
                f"{config.rope_pretrained_grid}: pass rope_pretrained_grid={grid}."
            )
    return ["The file's rotary tables fit no grid; they are computed anew, as the published code does it."]
