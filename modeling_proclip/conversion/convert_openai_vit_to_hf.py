"""OpenAI's ViT, in the layout of OpenAI's and OpenCLIP's code (`visual.conv1`, ...) and in that of the Hub (`vision_model.embeddings`, ...)."""

from collections.abc import Mapping

from transformers import CLIPVisionConfig

from .positions import positions_rule
from .rules import (
    Options,
    Rule,
    Rules,
    Tower,
    affine,
    build_config,
    chunk,
    count_heads,
    count_layers,
    new_grid,
    shape_of,
    square_side,
)
from .stored_tensors import StoredTensor


LAYERS = "visual.transformer.resblocks."


def convert_openai_vit(tensors: Mapping[str, StoredTensor], options: Options) -> Tower:
    """The tower of ProCLIP's and LLM2CLIP's `.pt` files with OpenAI's CLIP."""
    num_layers = count_layers(tensors, LAYERS)
    mlp_width = shape_of(tensors, f"{LAYERS}0.mlp.c_fc.weight", 2)[0]
    projection_dim = shape_of(tensors, "visual.proj", 2)[1]
    config, grid = _config(
        tensors, options, "visual.conv1.weight", "visual.positional_embedding", num_layers, mlp_width, projection_dim
    )
    ours = "vision_model."
    rules: Rules = {
        f"{ours}embeddings.class_embedding": Rule(("visual.class_embedding",)),
        f"{ours}embeddings.patch_embedding.weight": Rule(("visual.conv1.weight",)),
        f"{ours}embeddings.position_embedding.weight": Rule(
            ("visual.positional_embedding",), positions_rule(grid, leading=1, align_corners=True)
        ),
        "visual_projection.weight": Rule(("visual.proj",), lambda tensor: tensor.T),
        **affine(f"{ours}pre_layrnorm", "visual.ln_pre"),
        **affine(f"{ours}post_layernorm", "visual.ln_post"),
    }
    for i in range(num_layers):
        layer, published = f"{ours}encoder.layers.{i}.", f"{LAYERS}{i}."
        for kind in ("weight", "bias"):
            for part, name in enumerate("qkv"):
                rules[f"{layer}self_attn.{name}_proj.{kind}"] = Rule(
                    (f"{published}attn.in_proj_{kind}",), chunk(part, 3)
                )
        rules |= affine(f"{layer}self_attn.out_proj", f"{published}attn.out_proj")
        rules |= affine(f"{layer}layer_norm1", f"{published}ln_1") | affine(f"{layer}layer_norm2", f"{published}ln_2")
        rules |= affine(f"{layer}mlp.fc1", f"{published}mlp.c_fc") | affine(
            f"{layer}mlp.fc2", f"{published}mlp.c_proj"
        )
    return Tower(_title(config), config, rules, projection_dim)


def convert_hub_vit(tensors: Mapping[str, StoredTensor], options: Options, hidden_act: str | None) -> Tower:
    """
    The tower of LLM2CLIP's Hub folders, which is Transformers' CLIP already.

    Args:
        tensors, options: As everywhere.
        hidden_act: The activation that the folder's config.json names, if it has one.
    """
    # Transformers 4 has one `vision_model.` more where the tower was a model of its own.
    theirs = (
        "vision_model.vision_model."
        if any(n.startswith("vision_model.vision_model.") for n in tensors)
        else "vision_model."
    )
    layers, positions = f"{theirs}encoder.layers.", f"{theirs}embeddings.position_embedding.weight"
    num_layers = count_layers(tensors, layers)
    mlp_width = shape_of(tensors, f"{layers}0.mlp.fc1.weight", 2)[0]
    projection_dim = shape_of(tensors, "visual_projection.weight", 2)[0]
    patches = f"{theirs}embeddings.patch_embedding.weight"
    config, grid = _config(tensors, options, patches, positions, num_layers, mlp_width, projection_dim, hidden_act)
    names = [name for name in tensors if name.startswith(theirs)]
    rules = {f"vision_model.{name.removeprefix(theirs)}": Rule((name,)) for name in names}
    rules["vision_model.embeddings.position_embedding.weight"] = Rule(
        (positions,), positions_rule(grid, leading=1, align_corners=True)
    )
    rules["visual_projection.weight"] = Rule(("visual_projection.weight",))
    return Tower(_title(config), config, rules, projection_dim)


def _config(tensors, options, patches, positions, num_layers, mlp_width, projection_dim, hidden_act=None):
    width, channels, patch_size, _ = shape_of(tensors, patches, 4)
    grid = square_side(shape_of(tensors, positions, 2)[0] - 1, positions)
    image_size, grid = new_grid(grid, patch_size, options.image_size)
    if options.quick_gelu is not None or hidden_act is None:
        hidden_act = "gelu" if options.quick_gelu is False else "quick_gelu"
    config = build_config(
        CLIPVisionConfig,
        hidden_size=width,
        intermediate_size=mlp_width,
        projection_dim=projection_dim,
        num_hidden_layers=num_layers,
        num_attention_heads=count_heads(width, options.head_width),
        num_channels=channels,
        image_size=image_size,
        patch_size=patch_size,
        hidden_act=hidden_act,
    )
    return config, grid


def _title(config: CLIPVisionConfig) -> str:
    return f"OpenAI CLIP ViT, {'QuickGELU' if config.hidden_act == 'quick_gelu' else config.hidden_act}"
