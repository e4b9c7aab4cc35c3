"""OpenAI's ViT, in the layout of OpenAI's and OpenCLIP's code (`visual.conv1`, ...) and in that of the Hub (`vision_model.embeddings`, ...)."""

from collections.abc import Mapping

from transformers import CLIPVisionConfig

from .positions import positions_rule
from .rules import Options, Rule, Rules, Tower, ViTSizes, affine, build_config, chunk, shape_of, vit_sizes
from .stored_tensors import StoredTensor


LAYERS = "visual.transformer.resblocks."


def convert_openai_vit(tensors: Mapping[str, StoredTensor], options: Options) -> Tower:
    """The tower of ProCLIP's and LLM2CLIP's `.pt` files with OpenAI's CLIP."""
    projection_dim = shape_of(tensors, "visual.proj", 2)[1]
    sizes = vit_sizes(
        tensors,
        options,
        patches="visual.conv1.weight",
        positions="visual.positional_embedding",
        positions_dims=2,
        leading=1,
        layers=LAYERS,
        mlp="mlp.c_fc.weight",
        head_width=options.head_width,
    )
    config = _config(sizes, projection_dim, options, None)
    ours = "vision_model."
    rules: Rules = {
        f"{ours}embeddings.class_embedding": Rule(("visual.class_embedding",)),
        f"{ours}embeddings.patch_embedding.weight": Rule(("visual.conv1.weight",)),
        f"{ours}embeddings.position_embedding.weight": Rule(
            ("visual.positional_embedding",), positions_rule(sizes.grid, leading=1, align_corners=True)
        ),
        "visual_projection.weight": Rule(("visual.proj",), lambda tensor: tensor.T),
        **affine(f"{ours}pre_layrnorm", "visual.ln_pre"),
        **affine(f"{ours}post_layernorm", "visual.ln_post"),
    }
    for i in range(config.num_hidden_layers):
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
    """The tower of LLM2CLIP's Hub folders, which is Transformers' CLIP already, with the activation that the folder's config.json names, if it has one."""
    # Transformers 4 has one `vision_model.` more where the tower was a model of its own.
    theirs = (
        "vision_model.vision_model."
        if any(n.startswith("vision_model.vision_model.") for n in tensors)
        else "vision_model."
    )
    positions = f"{theirs}embeddings.position_embedding.weight"
    projection_dim = shape_of(tensors, "visual_projection.weight", 2)[0]
    sizes = vit_sizes(
        tensors,
        options,
        patches=f"{theirs}embeddings.patch_embedding.weight",
        positions=positions,
        positions_dims=2,
        leading=1,
        layers=f"{theirs}encoder.layers.",
        mlp="mlp.fc1.weight",
        head_width=options.head_width,
    )
    config = _config(sizes, projection_dim, options, hidden_act)
    names = [name for name in tensors if name.startswith(theirs)]
    rules = {f"vision_model.{name.removeprefix(theirs)}": Rule((name,)) for name in names}
    rules["vision_model.embeddings.position_embedding.weight"] = Rule(
        (positions,), positions_rule(sizes.grid, leading=1, align_corners=True)
    )
    rules["visual_projection.weight"] = Rule(("visual_projection.weight",))
    return Tower(_title(config), config, rules, projection_dim)


def _config(sizes: ViTSizes, projection_dim: int, options: Options, hidden_act: str | None) -> CLIPVisionConfig:
    if options.quick_gelu is not None or hidden_act is None:
        hidden_act = "gelu" if options.quick_gelu is False else "quick_gelu"
    return build_config(CLIPVisionConfig, **sizes.config_values, projection_dim=projection_dim, hidden_act=hidden_act)


def _title(config: CLIPVisionConfig) -> str:
    return f"OpenAI CLIP ViT, {'QuickGELU' if config.hidden_act == 'quick_gelu' else config.hidden_act}"
