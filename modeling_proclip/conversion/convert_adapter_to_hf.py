"""The text adapter of ProCLIP and LLM2CLIP: "adaptor" in `.pt` files, under `text_adapter` in Hub folders."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import ConversionError
from .rules import Rule, Rules, affine, count_layers, describe_names, shape_of
from .stored_tensors import StoredTensor


# Prefix -> whether the published code divides the LLM's embedding by its length before this adapter.
PREFIXES: dict[str, Literal["l2", "none"]] = {
    "text.text_adaptor.": "l2",
    "text.text_proj.text_adaptor.": "none",  # the SigLIP2 variant, which runs the LLM itself
    "text_adapter.adaptor.": "l2",
    "text_adapter.text_adaptor.": "l2",
}


@dataclass(frozen=True)
class Adapter:
    """The text adapter that a checkpoint holds: size of the LLM's embeddings and of the shared space, number of residual blocks, hidden size of a block over
    the LLM's size, whether the LLM's embedding is divided by its length first, and whether the last linear layer has a bias.
    """

    llm_size: int
    projection_dim: int
    num_layers: int
    expansion: int | float
    input_norm: Literal["l2", "none"]
    output_bias: bool
    rules: Rules


def convert_adapter(tensors: Mapping[str, StoredTensor], input_norm: Literal["l2", "none"] | None) -> Adapter:
    """Depth, sizes and expansion come from shapes, the input norm from the layout unless `input_norm` says it."""
    found = [prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in tensors)]
    if len(found) != 1:
        file = next(iter(tensors.values())).file
        raise ConversionError(
            f"{file} holds {'several text adapters' if found else 'no text adapter'}; {describe_names(tensors)}. A vision tower alone loads "
            "with Transformers or OpenCLIP."
        )
    prefix = found[0]
    if input_norm not in (None, "l2", "none"):
        raise ConversionError(f'adapter_input_norm of a published checkpoint is "l2" or "none", got {input_norm!r}.')
    # The blocks, then a layer norm, then the projection, all numbered in one sequence.
    num_layers = count_layers(tensors, prefix) - 2
    if num_layers < 0:
        raise ConversionError(f"{prefix}* has neither a layer norm nor a projection at its end.")
    norm, projection = f"{prefix}{num_layers}", f"{prefix}{num_layers + 1}"
    projection_dim, llm_size = shape_of(tensors, f"{projection}.weight", 2)
    hidden_size = shape_of(tensors, f"{prefix}0.fn.0.weight", 2)[0] if num_layers else llm_size
    output_bias = f"{projection}.bias" in tensors
    rules: dict[str, Rule] = affine("text_adapter.layer_norm", norm)
    rules |= affine("text_adapter.projection", projection, bias=output_bias)
    for i in range(num_layers):
        ours, published = f"text_adapter.blocks.{i}.", f"{prefix}{i}."
        rules |= affine(f"{ours}layer_norm", f"{published}ln")
        rules |= affine(f"{ours}fc1", f"{published}fn.0") | affine(f"{ours}fc2", f"{published}fn.3")
    expansion = hidden_size / llm_size
    return Adapter(
        llm_size=llm_size,
        projection_dim=projection_dim,
        num_layers=num_layers,
        expansion=int(expansion) if expansion.is_integer() else expansion,
        input_norm=input_norm or PREFIXES[prefix],
        output_bias=output_bias,
        rules=rules,
    )
