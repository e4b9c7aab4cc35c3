"""Checkpoints without the frozen LLM: what they record of it, and how it comes back."""

import os
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .configuration_proclip import ProCLIPConfig
from .pretrained_towers import absolute, load_text
from .text_tower import module_sha256, state_sha256, weights_sha256


logger = logging.get_logger(__name__)


def record_text_model(config: ProCLIPConfig, text_state: dict[str, torch.Tensor], lean: bool) -> None:
    """
    Set `config.text_model_sha256` to the content hash of the LLM that a checkpoint about to be saved belongs to.

    Args:
        text_state (`dict[str, torch.Tensor]`): State dict of the LLM; empty if there is none. Of one that is offloaded to disk, which
            nothing has changed, what is recorded stays.
        lean (`bool`): Whether the checkpoint will leave it out.

    Raises:
        ValueError: If it is left out although it has no name or is not what its name holds.
    """
    name_or_path, revision = config.text_model_name_or_path, config.text_model_revision
    in_memory = bool(text_state) and all(tensor.device.type != "meta" for tensor in text_state.values())
    if lean and in_memory:
        if name_or_path is None:
            raise ValueError(
                "A lean checkpoint names its LLM: set model.config.text_model_name_or_path to its folder or Hub name, or save with lean=False."
            )
        config.text_model_sha256 = weights_sha256(name_or_path, revision, same_as=text_state)
    elif in_memory:
        # The checkpoint may be loaded without its LLM and saved lean, so it must say which one it has, changed or not.
        try:
            if name_or_path is None:
                raise FileNotFoundError
            config.text_model_sha256 = weights_sha256(
                name_or_path, revision, same_as=text_state, local_files_only=True
            )
        except (OSError, ValueError):
            config.text_model_sha256 = state_sha256(text_state)
    elif config.text_model_sha256 is None and name_or_path is not None:
        try:
            config.text_model_sha256 = weights_sha256(name_or_path, revision, local_files_only=True)
        except (OSError, ValueError) as error:
            logger.warning(
                f"The LLM {name_or_path!r} cannot be read, so the checkpoint cannot tell it from another one: {error}"
            )


def recorded_text_model(
    config: ProCLIPConfig,
    text_model: str | os.PathLike | PreTrainedModel | None,
    dtype: str | torch.dtype | None,
    kwargs: dict[str, Any],
    verify: bool = True,
) -> PreTrainedModel:
    """
    The LLM that a lean checkpoint belongs to. Its new place is kept in `config`.

    Args:
        text_model (`str`, `os.PathLike` or `PreTrainedModel`, *optional*): Where it lies now, or the LLM itself.
        kwargs (`dict`): The arguments of `from_pretrained`, of which those about downloads and `device_map` matter.
        verify (`bool`, defaults to `True`): Whether its weights must have the recorded hash.

    Raises:
        ValueError: If it is not the one that the checkpoint was made with.
        OSError: If it cannot be read.
    """
    if isinstance(text_model, PreTrainedModel):
        text_model = text_model.base_model
        if text_model.config.hidden_size != config.text_config.hidden_size:
            raise ValueError(
                f"The checkpoint was made with an LLM of {config.text_config.hidden_size} dimensions; the one given has "
                f"{text_model.config.hidden_size}."
            )
        if verify and config.text_model_sha256 not in (None, module_sha256(text_model)):
            raise ValueError(
                "The LLM given has other weights than the one that the checkpoint was made with, or the same in another dtype than its files "
                "have. Name its folder in place of the model, or pass verify_text_model=False if you know that it is the right one."
            )
        text_model.config.is_causal = False
        return text_model
    source = config.text_model_name_or_path if text_model is None else os.fspath(text_model)
    revision = config.text_model_revision if text_model is None else None
    remedy = "Pass text_model=... with its place, or load_text_model=False for the vision side only."
    if source is None:
        raise ValueError(f"This lean checkpoint does not say which LLM it belongs to. {remedy}")
    download_kwargs = {key: kwargs[key] for key in ("cache_dir", "token", "local_files_only") if key in kwargs}
    try:
        found = weights_sha256(source, revision, **download_kwargs) if verify else config.text_model_sha256
    except OSError as error:
        raise OSError(f"The LLM {source!r} of this lean checkpoint cannot be read: {error}\n{remedy}") from error
    if config.text_model_sha256 not in (None, found):
        raise ValueError(
            f"This lean checkpoint was made with an LLM whose weights have SHA-256 {config.text_model_sha256}, but {source!r} has {found}. "
            "Pass text_model=... with the right one, or verify_text_model=False if you know that this is."
        )
    config.text_model_name_or_path, config.text_model_revision = absolute(source), revision
    device_map = kwargs.get("device_map")
    if isinstance(device_map, dict):  # what it says of text_model, seen from the LLM
        device_map = {
            "" if module in ("", "text_model") else module.removeprefix("text_model."): device
            for module, device in device_map.items()
            if module in ("", "text_model") or module.startswith("text_model.")
        }
    return load_text(
        source, revision, dtype, config.text_config._attn_implementation, device_map=device_map, **download_kwargs
    )
