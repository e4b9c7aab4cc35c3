"""Checkpoints without the frozen LLM: what they record of it, and how the same LLM, and no other, comes back."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .configuration_proclip import ProCLIPConfig
from .identity import (
    WeightsDifferError,
    check_same_weights,
    differences,
    llm_config_values,
    load_llm_config,
    module_sha256,
    state_sha256,
    weights_sha256,
)
from .pretrained_towers import bidirectional, lasting_name, load_text_tower


logger = logging.get_logger(__name__)


def record_text_model(config: ProCLIPConfig, text_state: Mapping[str, torch.Tensor], lean: bool) -> None:
    """Set `config.text_model_sha256` to the content hash of the LLM that a checkpoint about to be saved belongs to.

    Args:
        text_state (`dict[str, torch.Tensor]`): State dict of the LLM; empty if there is none. If it is offloaded to disk, what was
            recorded before stays, as nothing has changed it.
        lean (`bool`): Whether the checkpoint will leave the LLM out. ValueError if that LLM has no name, or its name holds other weights or
            another configuration.
    """
    name_or_path, revision = config.text_model_name_or_path, config.text_model_revision
    in_memory = bool(text_state) and all(tensor.device.type != "meta" for tensor in text_state.values())
    if lean and in_memory:
        if name_or_path is None:
            raise ValueError(
                "A lean checkpoint names its LLM: set model.config.text_model_name_or_path to its folder or Hub name, or save with lean=False."
            )
        try:
            config.text_model_sha256 = weights_sha256(name_or_path, revision, same_as=text_state)
        except WeightsDifferError as error:
            raise ValueError(_would_be_lost(str(error))) from error
        check_text_config(config, name_or_path, revision, error_message=_would_be_lost)
    elif in_memory:
        # The checkpoint may be loaded without its LLM and saved lean, so it must say which one it has, changed or not.
        config.text_model_sha256 = text_model_sha256(config, text_state)
    elif config.text_model_sha256 is None and name_or_path is not None:
        try:
            config.text_model_sha256 = weights_sha256(name_or_path, revision, local_files_only=True)
        except (OSError, ValueError) as error:
            logger.warning(
                f"The LLM {name_or_path!r} cannot be read, so the checkpoint cannot tell it from another one: {error}"
            )


def text_model_sha256(config: ProCLIPConfig, text_state: Mapping[str, torch.Tensor]) -> str:
    """Content hash of an LLM in memory: that of the files it came from, whatever its dtype, where they are on this machine and hold the same
    weights; else that of `text_state` itself.
    """
    if config.text_model_name_or_path is not None:
        try:
            return weights_sha256(
                config.text_model_name_or_path, config.text_model_revision, same_as=text_state, local_files_only=True
            )
        except (OSError, ValueError):
            pass  # not there, or changed since
    return state_sha256(text_state)


def check_text_config(
    config: ProCLIPConfig,
    text_model: str | os.PathLike | PreTrainedConfig,
    revision: str | None = None,
    *,
    error_message: Any = None,
    **download_kwargs: Any,
) -> None:
    """Raises ValueError if an LLM (folder, Hub name or configuration) has another configuration than `config.text_config`, the one that the checkpoint
    records, which would give other embeddings of the same weights. `error_message` makes the error's message of what differs.
    """
    found, name = text_model, "the LLM given"
    if not isinstance(found, PreTrainedConfig):
        name = os.fspath(found)
        found = load_llm_config(found, revision, **download_kwargs)
    recorded, given = llm_config_values(config.text_config), llm_config_values(found)
    if config.text_model_sha256 is None and config.text_model_name_or_path is None:
        # A converted checkpoint that no LLM was named for: all that is known of its LLM is the size of the embeddings.
        recorded, given = ({"hidden_size": values["hidden_size"]} for values in (recorded, given))
    changes = list(differences(recorded, given, "text_config."))
    if changes:
        what = f"{'; '.join(changes[:3])} (there: the checkpoint, here: {name})"
        raise ValueError(_another_configuration(what) if error_message is None else error_message(what))


def recorded_text_model(
    config: ProCLIPConfig,
    text_model: str | os.PathLike | PreTrainedModel | None,
    dtype: str | torch.dtype | None,
    kwargs: Mapping[str, Any],
    verify: bool = True,
) -> PreTrainedModel:
    """The LLM that a lean checkpoint belongs to. Its new place is kept in `config`. No code that comes with it is run.

    Args:
        text_model (`str`, `os.PathLike` or `PreTrainedModel`, *optional*): Where it is now, or the LLM itself.
        kwargs (`dict`): The arguments of `from_pretrained`; those about downloads and `device_map` are used.
        verify (`bool`, defaults to `True`): Whether its configuration must be the recorded one, its weights must have the recorded hash, and
            what was loaded must be what was hashed. Costs two more readings of its files.

    Raises:
        ValueError: If it is not the one that the checkpoint was made with.
        OSError: If it cannot be read.
    """
    if isinstance(text_model, PreTrainedModel):
        return _given_text_model(config, text_model.base_model, verify)
    source = config.text_model_name_or_path if text_model is None else os.fspath(text_model)
    revision = config.text_model_revision if text_model is None else None
    remedy = "Pass text_model=... with its place, or load_text_model=False for the vision side only."
    if source is None:
        raise ValueError(f"This lean checkpoint does not say which LLM it belongs to. {remedy}")
    download_kwargs = {key: kwargs[key] for key in ("cache_dir", "token", "local_files_only") if key in kwargs}
    try:
        if verify:
            check_text_config(config, source, revision, **download_kwargs)
            _check_hash(config, source, weights_sha256(source, revision, **download_kwargs))
    except OSError as error:
        raise OSError(f"The LLM {source!r} of this lean checkpoint cannot be read: {error}\n{remedy}") from error
    config.text_model_name_or_path, config.text_model_revision = lasting_name(source), revision
    device_map = kwargs.get("device_map")
    if isinstance(device_map, dict):  # what it says of text_model, seen from the LLM
        device_map = {
            "" if module in ("", "text_model") else module.removeprefix("text_model."): device
            for module, device in device_map.items()
            if module in ("", "text_model") or module.startswith("text_model.")
        }
    loaded = load_text_tower(
        source, revision, dtype, config.text_config._attn_implementation, device_map=device_map, **download_kwargs
    )
    if verify:
        # The hash is of files that we chose and the LLM is what Transformers chose to load: they must be the same.
        try:
            check_same_weights(loaded.state_dict(), source, revision, **download_kwargs)
        except WeightsDifferError as error:
            raise ValueError(
                f"Transformers loads something else from {source!r} than its safetensors: {error}"
            ) from error
    return loaded


def _given_text_model(config: ProCLIPConfig, text_model: PreTrainedModel, verify: bool) -> PreTrainedModel:
    """The LLM that the caller passed, made bidirectional."""
    if text_model.config.hidden_size != config.text_config.hidden_size:
        raise ValueError(
            f"The checkpoint was made with an LLM of {config.text_config.hidden_size} dimensions; the one given has "
            f"{text_model.config.hidden_size}."
        )
    if verify:
        check_text_config(config, text_model.config)
        if config.text_model_sha256 is None:
            _warn_unverified()
        elif config.text_model_sha256 != module_sha256(text_model):
            raise ValueError(
                "The LLM given has other weights than the one that the checkpoint was made with, or the same in another dtype than its files "
                "have. Name its folder in place of the model, or pass verify_text_model=False if you know that it is the right one."
            )
    return bidirectional(text_model)


def _check_hash(config: ProCLIPConfig, source: str, found: str) -> None:
    if config.text_model_sha256 is None:
        _warn_unverified()
    elif config.text_model_sha256 != found:
        raise ValueError(
            f"This lean checkpoint was made with an LLM whose weights have SHA-256 {config.text_model_sha256}, but {source!r} has {found}. "
            "Pass text_model=... with the right one, or verify_text_model=False if you know that this is."
        )


def _warn_unverified() -> None:
    logger.warning_once(
        "This lean checkpoint does not record the hash of its LLM's weights, so it cannot tell it from another one."
    )


def _another_configuration(what: str) -> str:
    return (
        f"This lean checkpoint was made with an LLM of another configuration: {what}. Pass text_model=... with the right one, or "
        "verify_text_model=False if you know that this is."
    )


def _would_be_lost(what: str) -> str:
    return (
        f"{what}: the LLM was changed since, and a lean checkpoint would lose that. Save the checkpoint with lean=False, or save the LLM by "
        "itself (model.text_model.save_pretrained) and set model.config.text_model_name_or_path to that folder."
    )
