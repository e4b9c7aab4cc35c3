"""The LLM side of ProCLIP: pooling of token states, proof that attention looks both ways, identity of the LLM's weights."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel


def pool_tokens(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    token_type_ids: torch.Tensor | None = None,
    pooling: str = "mean",
) -> torch.Tensor:
    """
    One embedding a text from the LLM's token states, as LLM2Vec does it (arXiv 2404.05961; ProCLIP uses "mean").

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Last hidden states.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 on tokens, 0 on padding, which may be on either side.
        token_type_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            1 on the tokens to pool (content and end of turn), 0 on BOS, template header and padding: what [`ProCLIPProcessor`] returns.
            All tokens are pooled when it is missing, or in a row where it is 0 throughout.
        pooling (`str`):
            "mean": mean of the pooled tokens. "weighted_mean": the i-th of n pooled tokens weighs i / (1 + ... + n).
            "last_token", "eos_token": the last token (the reference reads both there). "bos_token": the first token.

    Returns:
        `torch.Tensor` of shape `(batch_size, hidden_size)`, in the dtype of `hidden_states`; sums are taken in float32.
    """
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
    attended = attention_mask.to(hidden_states.device).bool()
    if pooling in ("last_token", "eos_token"):
        return hidden_states[rows, torch.where(attended, positions, -1).argmax(dim=1)]
    if pooling == "bos_token":
        return hidden_states[rows, attended.int().argmax(dim=1)]
    pooled = attended if token_type_ids is None else attended & token_type_ids.to(hidden_states.device).bool()
    # The reference averages padding too where a row has nothing to pool; all its real tokens are the sensible reading.
    pooled = torch.where(pooled.any(dim=1, keepdim=True), pooled, attended).float()
    weights = pooled if pooling == "mean" else pooled.cumsum(dim=1) * pooled
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.bmm(weights[:, None], hidden_states.float())[:, 0].to(hidden_states.dtype)


@torch.no_grad()
def check_bidirectional(text_model: nn.Module) -> None:
    """
    Prove that `text_model` attends in both directions, and to tokens only: when the last token changes, the first token's state must move;
    when a padding token changes, it must not.

    Some families ignore `config.is_causal = False` in some attention implementations, with or without padding, so both are tried on the
    model as loaded. Costs two forward passes over four texts of five tokens, in eval mode.

    Raises:
        ValueError: If the first state does not move, or moves with the padding, naming the family and the remedy.
    """
    embeddings = text_model.get_input_embeddings().weight
    # Offloaded weights, which are on "meta", come in as they are needed.
    device = "cpu" if embeddings.device.type == "meta" else embeddings.device
    tokens = torch.arange(1, 6, device=device).remainder(embeddings.shape[0])
    # Rows 0 and 1 are equal, so their difference is the arithmetic's own noise. Row 2 ends and row 3 begins with another token.
    input_ids = tokens.repeat(4, 1)
    input_ids[2, -1] = input_ids[3, 0] = 6 % embeddings.shape[0]
    padded = torch.ones_like(input_ids)
    padded[:, 0] = 0
    was_training = {module: module.training for module in text_model.modules()}
    text_model.eval()
    try:
        for attention_mask, first in ((None, 0), (padded, 1)):
            states = text_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            _, noise, signal, leak = (states[:, first] - states[0, first]).float().abs().amax(dim=1).tolist()
            if not signal > 10 * noise:
                raise ValueError(
                    f"The text model {_describe(text_model)} stays causal {'without padding' if first == 0 else 'in a padded batch'}: its first "
                    "token does not see the last one, so its embeddings would be wrong. Try attn_implementation={'text_config': 'eager'}, or "
                    "take an LLM of another family (Llama, Qwen2, Qwen3, Mistral, Gemma and Phi-3 are tested)."
                )
        if leak > signal / 100:
            raise ValueError(
                f"The text model {_describe(text_model)} attends to padding, so an embedding would depend on the texts beside it. Try "
                "attn_implementation={'text_config': 'eager'}."
            )
    finally:
        for module, training in was_training.items():
            module.training = training


def _describe(text_model: nn.Module) -> str:
    return f"{type(text_model).__name__} with {text_model.config._attn_implementation!r} attention"


def _weight_files(name_or_path: str | os.PathLike, revision: str | None, **download_kwargs) -> list[Path]:
    folder = Path(name_or_path)
    if not folder.is_dir():
        patterns = ["model*.safetensors", "model.safetensors.index.json"]
        folder = Path(
            snapshot_download(os.fspath(name_or_path), revision=revision, allow_patterns=patterns, **download_kwargs)
        )
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    files = [folder / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: a lean checkpoint needs its LLM as safetensors. Save the LLM with save_pretrained first, or save the "
                "checkpoint with lean=False."
            )
    return files


def _iterate_weights(
    name_or_path: str | os.PathLike, revision: str | None, **download_kwargs
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    The tensors of an LLM's safetensors files, one at a time and in the order of their names, as its base model names them.

    A causal-LM checkpoint and that of its base model give the same: the prefix is dropped and the head is left out.
    """
    config = AutoConfig.from_pretrained(name_or_path, revision=revision or "main", **download_kwargs)
    with torch.device("meta"):
        base_model = AutoModel.from_config(config.get_text_config())
    names, prefix = set(base_model.state_dict()), base_model.base_model_prefix + "."
    places = {}
    for file in _weight_files(name_or_path, revision, **download_kwargs):
        with safe_open(file, framework="pt") as tensors:
            places.update({key.removeprefix(prefix): (file, key) for key in tensors.keys()})
    if missing := names - set(places):
        raise ValueError(f"{name_or_path} has no tensor {min(missing)!r} of a {type(base_model).__name__}.")
    for name in sorted(names):
        file, key = places[name]
        with safe_open(file, framework="pt") as tensors:
            yield name, tensors.get_tensor(key)


def weights_sha256(
    name_or_path: str | os.PathLike,
    revision: str | None = None,
    *,
    same_as: dict[str, torch.Tensor] | None = None,
    **download_kwargs: Any,
) -> str:
    """
    Content hash of an LLM's files: SHA-256 over name, dtype, shape and bytes of every tensor, the same however the files are sharded.

    Args:
        same_as (`dict[str, torch.Tensor]`, *optional*):
            State dict of an LLM in memory that must hold the same weights, each in the dtype that it has there.

    Raises:
        FileNotFoundError: If the model has no safetensors files.
        ValueError: Naming a tensor that the files lack, or the first of `same_as` that differs: a lean checkpoint of a changed LLM would
            lose the change.
    """
    digest = hashlib.sha256()
    in_memory = {} if same_as is None else dict(same_as)
    for name, tensor in _iterate_weights(name_or_path, revision, **download_kwargs):
        _update(digest, name, tensor)
        ours = in_memory.pop(name, None)
        if same_as is not None and (ours is None or not torch.equal(ours.cpu(), tensor.to(ours.dtype))):
            raise ValueError(_changed(name, name_or_path))
    if in_memory:
        raise ValueError(_changed(next(iter(in_memory)), name_or_path))
    return digest.hexdigest()


def module_sha256(text_model: nn.Module) -> str:
    """Content hash of an LLM in memory: that of its files, as long as it is in their dtype; see [`weights_sha256`]."""
    return state_sha256(text_model.state_dict())


def state_sha256(state_dict: dict[str, torch.Tensor]) -> str:
    """Content hash of an LLM's state dict; see [`module_sha256`]."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        _update(digest, name, tensor.cpu())
    return digest.hexdigest()


def own_weights_sha256(state_dict: dict[str, torch.Tensor]) -> str:
    """Content hash of what of a ProCLIP's state dict is not the LLM's, in float32: the same for a full and for a lean checkpoint of it."""
    own = {name: tensor.float() for name, tensor in state_dict.items() if not name.startswith("text_model.")}
    return state_sha256(own)


def _update(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _changed(tensor_name: str, name_or_path: str | os.PathLike) -> str:
    return (
        f"text_model.{tensor_name} is not what {name_or_path} holds: the LLM was changed since, and a lean checkpoint would lose that. "
        "Save the checkpoint with lean=False, or save the LLM by itself (model.text_model.save_pretrained) and set "
        "model.config.text_model_name_or_path to that folder."
    )
