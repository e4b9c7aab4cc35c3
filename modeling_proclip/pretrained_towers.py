"""Loading of pretrained image encoders and LLMs, and arguments that differ between the two."""

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .configuration_proclip import TOWERS
from .identity import load_llm_config


def tower_argument(value: Any, tower: str, default: Any = None) -> Any:
    """One tower's part of an argument: the argument itself, or what a dict has under the tower's key or under `""`."""
    return value.get(tower, value.get("", default)) if isinstance(value, dict) else value


@contextmanager
def explain_flash_attention() -> Iterator[None]:
    """The context in which a FlashAttention that is asked for and cannot be used is one error with the remedies."""
    try:
        yield
    except ImportError as error:
        asked = re.search(r"FlashAttention(\d).*following error: (.*?)\.?$", str(error), flags=re.DOTALL)
        if asked is None:
            raise
        package = "flash-attn" if asked[1] == "2" else f"flash-attn-{asked[1]}"
        raise ImportError(
            f"flash_attention_{asked[1]} cannot be used: {asked[2]}. Install it (pip install --no-build-isolation {package}), or leave "
            "attn_implementation out: on CUDA, in float16 and bfloat16, texts are packed and go through PyTorch's own variable-length kernel, "
            "which serves as well and needs no package."
        ) from error


def tower_dtypes(dtype: str | torch.dtype | dict | None, config: PreTrainedConfig) -> dict[str, Any]:
    """The dtype of each tower and, under `""`, of the rest. What `dtype` leaves open is as `config` says it was saved."""
    if dtype is None or dtype == "auto":
        dtype = {}
    saved = {tower: getattr(config, tower).dtype for tower in TOWERS}
    # AutoModel writes the whole argument over what the configuration says.
    saved[""] = saved["vision_config"] if isinstance(config.dtype, dict) else config.dtype
    return {part: tower_argument(dtype, part, default) for part, default in saved.items()}


def pretrained_vision_tower(
    vision: str | os.PathLike | PreTrainedModel, revision: str, dtype: Any, attn_implementation: str | None
) -> tuple[PreTrainedModel, nn.Linear | None, float | None]:
    """The image encoder, and its projection and logit scale (as a logarithm) where the checkpoint has them."""
    if not isinstance(vision, PreTrainedModel):
        _refuse_other_modules(vision)
        config = AutoConfig.from_pretrained(vision, revision=revision, trust_remote_code=False)
        # AutoModel would drop the projection of a CLIPVisionModelWithProjection without a word.
        projected = "CLIPVisionModelWithProjection" in (config.architectures or [])
        loader = CLIPVisionModelWithProjection if projected else AutoModel
        vision = _load_complete(
            loader, vision, revision=revision, dtype=dtype, attn_implementation=attn_implementation
        )
    # CLIP, SigLIP and their kin all name their parts so; an image encoder alone has none of them.
    parts = dict(vision.named_children())
    if "vision_model" not in parts:
        if not isinstance(getattr(vision.config, "hidden_size", None), int):
            raise ValueError(
                f"{type(vision).__name__} has no hidden_size, so it is no image encoder that ProCLIP takes: it needs one pooled vector of that size "
                "for an image, as CLIP, SigLIP, DINOv2 and a ViT with its pooling layer give."
            )
        return vision, None, None
    projection = parts.get("visual_projection")
    logit_scale = dict(vision.named_parameters()).get("logit_scale")
    return (
        parts["vision_model"],
        projection if isinstance(projection, nn.Linear) else None,
        None if logit_scale is None else logit_scale.item(),
    )


def pretrained_text_tower(
    text: str | os.PathLike | PreTrainedModel, revision: str, dtype: Any, attn_implementation: str | None
) -> tuple[PreTrainedModel, str | None, str | None]:
    """The base model of a decoder LLM, bidirectional, and its name (a folder's absolute path) and commit where it has them."""
    if isinstance(text, PreTrainedModel):
        return bidirectional(text.base_model), lasting_name(text.name_or_path) or None, None
    _refuse_other_modules(text)
    commit = None
    if not os.path.isdir(text):
        commit = Path(cached_file(text, "config.json", revision=revision)).parent.name
    return load_text_tower(text, commit, dtype, attn_implementation), lasting_name(text), commit


def bidirectional(text_model: PreTrainedModel) -> PreTrainedModel:
    """An LLM whose attention looks both ways: itself if it does, or else a copy that shares all weights, so that whoever made the LLM can go on
    generating with it.
    """
    if not getattr(text_model.config, "is_causal", True):
        return text_model
    weights = {id(tensor): tensor for tensor in (*text_model.parameters(), *text_model.buffers())}
    text_model = copy.deepcopy(text_model, memo=weights)
    text_model.config.is_causal = False
    return text_model


def lasting_name(name_or_path: str | os.PathLike) -> str:
    """A folder's absolute path, by which it can be loaded from anywhere; a name on the Hub as it is."""
    return str(Path(name_or_path).resolve()) if os.path.isdir(name_or_path) else os.fspath(name_or_path)


def load_text_tower(
    name_or_path: str | os.PathLike,
    revision: str | None,
    dtype: Any,
    attn_implementation: str | None,
    device_map: Any = None,
    **download_kwargs: Any,
) -> PreTrainedModel:
    """The base model of a decoder LLM, told to attend in both directions."""
    config = load_llm_config(name_or_path, revision, **download_kwargs)
    config.is_causal = False
    return _load_complete(
        AutoModel,
        name_or_path,
        config=config,
        revision=revision or "main",
        dtype=dtype,
        attn_implementation=attn_implementation,
        device_map=device_map,
        **download_kwargs,
    )


def _load_complete(loader: Any, name_or_path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    # Code that comes with a tower is not run: its classes are those of Transformers.
    kwargs |= {"output_loading_info": True, "trust_remote_code": False}
    model, info = loader.from_pretrained(name_or_path, **kwargs)
    if info["missing_keys"]:
        raise ValueError(
            f"{name_or_path} has no weights for {sorted(info['missing_keys'])[0]!r} of {type(model).__name__} (and {len(info['missing_keys']) - 1} "
            "more): they would be random. Name a complete checkpoint, or pass a model that you loaded yourself."
        )
    return model


def _refuse_other_modules(source: Any) -> None:
    if isinstance(source, nn.Module):
        raise ValueError(
            f"A tower must be a model of Transformers, got {type(source).__name__}; merge PEFT adapters first: merge_and_unload()."
        )
