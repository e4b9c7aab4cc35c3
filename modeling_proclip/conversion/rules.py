"""How tensors of a published checkpoint become tensors of ours: rules by name, checked by shape before anything is read."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from .errors import ConversionError
from .stored_tensors import StoredTensor


MAX_LISTED = 40  # names in one error message


@dataclass(frozen=True)
class Rule:
    """One tensor of ours: `transform` of the published tensors `sources`. It must also work on meta tensors."""

    sources: tuple[str, ...]
    transform: Callable[..., torch.Tensor] = lambda tensor: tensor


Rules = dict[str, Rule]


@dataclass
class Tower:
    """The vision tower that a checkpoint holds.

    Attributes:
        title: What it is, for people.
        config: Configuration of the tower in Transformers.
        rules: Rules for its tensors and its projection, under the names of `ProCLIPModel`.
        projection_dim: Size of the projection, `None` for a tower without one.
        ignored: Regular expressions of published names that are expected and not needed.
        notes: Remarks for the user.
    """

    title: str
    config: PreTrainedConfig
    rules: Rules
    projection_dim: int | None
    projection_bias: bool = False
    ignored: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """What shapes cannot tell; see [`convert`]."""

    head_width: int = 64
    quick_gelu: bool | None = None
    image_size: int | None = None
    patch_size: int | None = None
    rope_pretrained_grid: int = 16


def shape_of(tensors: Mapping[str, StoredTensor], name: str, dims: int) -> tuple[int, ...]:
    """The shape of the published tensor `name`, which must have `dims` dimensions, none of them 0."""
    if name not in tensors:
        raise ConversionError(f"{_file(tensors)} has no tensor {name!r}; {describe_names(tensors)}.")
    shape = tensors[name].shape
    if len(shape) != dims or 0 in shape:
        raise ConversionError(f"{tensors[name].file}: tensor {name!r} of shape {shape} should have {dims} dimensions.")
    return shape


def count_layers(names: Iterable[str], prefix: str) -> int:
    """The number n of different i in names that begin with `prefix` + i + "."; they must be 0 to n - 1."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,9})\.")
    found = {int(match[1]) for name in names if (match := pattern.match(name))}
    if found != set(range(len(found))):
        missing = min(set(range(len(found))) - found)
        raise ConversionError(f"The checkpoint has no {prefix}{missing}, though it has {prefix}{max(found)}.")
    return len(found)


@dataclass(frozen=True)
class ViTSizes:
    """Sizes of a ViT, as its tensors' shapes and the options tell: those of its configuration, by their keys there, and the patches a side of the result and
    of the checkpoint.
    """

    config_values: dict[str, int]
    grid: int
    stored_grid: int


def vit_sizes(
    tensors: Mapping[str, StoredTensor],
    options: Options,
    *,
    patches: str,
    positions: str,
    positions_dims: int,
    leading: int,
    layers: str,
    mlp: str,
    head_width: int,
) -> ViTSizes:
    """The sizes of the ViT with square images that a checkpoint holds.

    Args:
        patches, positions: Names of the patch embedding's kernel and of the position embeddings.
        positions_dims: Dimensions of the position embeddings: 2, or 3 where the first is 1.
        leading: Positions in front that belong to no patch, such as the class token's.
        layers: What the names of the layers begin with, before their number.
        mlp: Name within a layer of the first weight of its MLP.
    """
    width, channels, stored_patch_size, _ = shape_of(tensors, patches, 4)
    count = shape_of(tensors, positions, positions_dims)[-2] - leading
    stored_grid = round(max(count, 0) ** 0.5)
    if stored_grid < 1 or stored_grid**2 != count:
        raise ConversionError(
            f"{tensors[positions].file}: {positions} has {count} patches, which is not a square grid."
        )
    patch_size = options.patch_size or stored_patch_size
    image_size = options.image_size or stored_grid * stored_patch_size
    if image_size < patch_size:
        raise ConversionError(f"image_size={image_size} is smaller than a patch of {patch_size} pixels.")
    if head_width < 1 or width % head_width:
        raise ConversionError(
            f"A tower of width {width} cannot have heads of width {head_width}: pass another head_width."
        )
    values = {
        "hidden_size": width,
        "intermediate_size": shape_of(tensors, f"{layers}0.{mlp}", 2)[0],
        "num_hidden_layers": count_layers(tensors, layers),
        "num_attention_heads": width // head_width,
        "num_channels": channels,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    return ViTSizes(values, image_size // patch_size, stored_grid)


def build_config(config_class: Callable[..., Any], **values: Any) -> Any:
    """A configuration; what it refuses is a fault of the checkpoint or the options."""
    try:
        return config_class(**values)
    except Exception as error:  # the library wraps its validation errors in several classes
        reason = str(error.__cause__ or error).strip().split("\n")[-1].strip()
        raise ConversionError(f"No model has these sizes: {reason}") from error


def affine(ours: str, published: str, bias: bool = True) -> Rules:
    """The rules of a linear layer, convolution or norm that is stored as ours is."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{ours}.{kind}": Rule((f"{published}.{kind}",)) for kind in kinds}


def chunk(index: int, chunks: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A transform that takes one of equal parts along the first dimension, as of a fused query, key and value."""
    return lambda tensor: tensor.unflatten(0, (chunks, -1))[index]


def check(
    rules: Rules, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], ignored: Iterable[str]
) -> list[str]:
    """Prove that `rules` make every tensor of a model with the given `shapes` out of `tensors`, each used, before anything is read. Returns the published
    names that are left over and expected to be; ConversionError lists what is missing, of the wrong shape, or unused.
    """
    used = {name for rule in rules.values() for name in rule.sources}
    problems = []
    if missing := sorted(used - set(tensors)):
        problems.append(f"missing from the checkpoint: {_listed(missing)}")
    if uncovered := sorted(set(shapes) - set(rules)):
        problems.append(f"needed by the model and not in the checkpoint's layout: {_listed(uncovered)}")
    pattern = re.compile("|".join(ignored) or r"(?!)")
    left = sorted(set(tensors) - used)
    if unused := [name for name in left if not pattern.fullmatch(name)]:
        problems.append(f"unused: {_listed(unused)}")
    wrong = []
    for ours, rule in rules.items():
        if all(name in tensors for name in rule.sources):
            found = transformed_shape(rule, tensors)
            if found != shapes.get(ours):
                stored = ", ".join(f"{name} {tensors[name].shape}" for name in rule.sources)
                wrong.append(f"{stored} for {ours}, which should be {shapes.get(ours)}")
    if wrong:
        problems.append(f"of the wrong shape: {_listed(wrong)}")
    if problems:
        raise ConversionError(f"{_file(tensors)} does not fit: " + "; ".join(problems) + ".")
    return left


def transformed_shape(rule: Rule, tensors: Mapping[str, StoredTensor]) -> tuple[int, ...] | None:
    """The shape that a rule will give, or `None` where its transform refuses what is stored."""
    try:
        stored = [torch.empty(tensors[name].shape, dtype=torch.float32, device="meta") for name in rule.sources]
        return tuple(rule.transform(*stored).shape)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None


def describe_names(tensors: Mapping[str, StoredTensor]) -> str:
    """The beginnings of the published names, for an error message."""
    tops = sorted({".".join(name.split(".")[:2]) for name in tensors})
    return f"its names begin with {_listed(tops)}" if tops else "it has no tensors at all"


def _file(tensors: Mapping[str, StoredTensor]) -> str:
    """The checkpoint's file, or the first of several, for an error message."""
    return str(next(iter(tensors.values())).file) if tensors else "The checkpoint"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
