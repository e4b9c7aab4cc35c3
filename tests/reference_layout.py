"""Where the reference's parameters sit in ours and in Transformers' CLIP, for cases that were recorded with its modules.

A map lists `(reference key, our keys)`. A fused parameter has several of ours, joined along dim 0 in this order; the two
bare projections, which the reference multiplies from the right, are transposed.
"""

import torch
from torch import nn


Map = list[tuple[str, tuple[str, ...]]]


def adapter_map(num_layers: int, reference: str = "text.text_adaptor.", ours: str = "") -> Map:
    """TextProj of the reference and `TextAdapter`."""
    result = []
    for kind in ("weight", "bias"):
        for i in range(num_layers):
            for theirs, name in (("ln", "layer_norm"), ("fn.0", "fc1"), ("fn.3", "fc2")):
                result.append((f"{reference}{i}.{theirs}.{kind}", (f"{ours}blocks.{i}.{name}.{kind}",)))
        result.append((f"{reference}{num_layers}.{kind}", (f"{ours}layer_norm.{kind}",)))
        result.append((f"{reference}{num_layers + 1}.{kind}", (f"{ours}projection.{kind}",)))
    return result


def _layers_map(num_layers: int, reference: str, ours: str) -> Map:
    result = []
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for i in range(num_layers):
        theirs, layer = f"{reference}transformer.resblocks.{i}.", f"{ours}encoder.layers.{i}."
        for kind in ("weight", "bias"):
            fused = tuple(f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv")
            result.append((f"{theirs}attn.in_proj_{kind}", fused))
            result += [(f"{theirs}{a}.{kind}", (f"{layer}{b}.{kind}",)) for a, b in names.items()]
    return result


def vision_map(num_layers: int, ours: str = "vision_model.", projection: str = "visual_projection.weight") -> Map:
    """The reference's ViT and `CLIPVisionModel` with its projection."""
    result = [
        ("visual.class_embedding", (f"{ours}embeddings.class_embedding",)),
        ("visual.positional_embedding", (f"{ours}embeddings.position_embedding.weight",)),
        ("visual.conv1.weight", (f"{ours}embeddings.patch_embedding.weight",)),
        ("visual.proj", (projection,)),
    ]
    for kind in ("weight", "bias"):
        result.append((f"visual.ln_pre.{kind}", (f"{ours}pre_layrnorm.{kind}",)))
        result.append((f"visual.ln_post.{kind}", (f"{ours}post_layernorm.{kind}",)))
    return result + _layers_map(num_layers, "visual.", ours)


def text_map(num_layers: int) -> Map:
    """The reference's native CLIP text transformer and `CLIPTextModelWithProjection`."""
    ours = "text_model."
    result = [
        ("positional_embedding", (f"{ours}embeddings.position_embedding.weight",)),
        ("token_embedding.weight", (f"{ours}embeddings.token_embedding.weight",)),
        ("text_projection", ("text_projection.weight",)),
    ]
    result += [(f"ln_final.{kind}", (f"{ours}final_layer_norm.{kind}",)) for kind in ("weight", "bias")]
    return result + _layers_map(num_layers, "", ours)


def load_reference(module: nn.Module, params: dict[str, torch.Tensor], layout: Map, prefix: str = "") -> None:
    """Loads `params` (keys: `prefix` + reference key) into `module`; every parameter of it must be in the map."""
    state = {}
    for theirs, ours in layout:
        tensor = params[prefix + theirs].T if _transposed(theirs) else params[prefix + theirs]
        state |= zip(ours, tensor.chunk(len(ours)) if len(ours) > 1 else (tensor,), strict=True)
    missing, unexpected = module.load_state_dict(state, strict=False)
    names = {name for name, _ in module.named_parameters()}
    assert not unexpected and not names.intersection(missing), (missing, unexpected)


def reference_gradients(module: nn.Module, layout: Map) -> dict[str, torch.Tensor]:
    """The gradients of `module` under the reference's keys and in its shapes."""
    parameters = dict(module.named_parameters())
    result = {}
    for theirs, ours in layout:
        gradient = torch.cat([parameters[name].grad for name in ours]) if len(ours) > 1 else parameters[ours[0]].grad
        result[theirs] = gradient.T if _transposed(theirs) else gradient
    return result


def _transposed(key: str) -> bool:
    return key in ("visual.proj", "text_projection")
