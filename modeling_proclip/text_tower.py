"""The LLM side of ProCLIP: pooling of token states, proof that attention looks both ways, identity of the LLM's weights."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn


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
    Prove that `text_model` attends in both directions: change the last token, and the first token's state must move.

    Some families ignore `config.is_causal = False` in some attention implementations, with or without padding, so both are tried on the
    model as loaded. Costs two forward passes over five tokens.

    Raises:
        ValueError: If the first state does not move, naming the family and the remedy.
    """
    embeddings = text_model.get_input_embeddings()
    if embeddings.weight.device.type == "meta":
        return
    vocab_size = embeddings.weight.shape[0]
    tokens = torch.arange(1, 6, device=embeddings.weight.device).remainder(vocab_size)
    # Rows 0 and 1 are equal, so their difference is the arithmetic's own noise; row 2 ends in another token.
    input_ids = tokens.repeat(3, 1)
    input_ids[2, -1] = 6 % vocab_size
    padded = torch.ones_like(input_ids)
    padded[:, 0] = 0
    was_training = text_model.training
    text_model.eval()
    for attention_mask, first in ((None, 0), (padded, 1)):
        states = text_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        states = states[:, first].float()
        noise, signal = (states[1] - states[0]).abs().max(), (states[2] - states[0]).abs().max()
        if not signal > 10 * noise:
            raise ValueError(
                f"The text model {type(text_model).__name__} ({text_model.config._attn_implementation!r} attention, "
                f"{'no padding' if attention_mask is None else 'padded batch'}) stays causal: its first token does not see the last one, "
                "so its embeddings would be wrong. Try attn_implementation={'text_config': 'eager'}, or take an LLM of another family "
                "(Llama, Qwen2, Qwen3, Mistral, Gemma and Phi-3 are tested)."
            )
    text_model.train(was_training)


def _weight_files(name_or_path: str, revision: str | None, **download_kwargs) -> list[Path]:
    folder = Path(name_or_path)
    if not folder.is_dir():
        patterns = ["model*.safetensors", "model.safetensors.index.json"]
        folder = Path(snapshot_download(name_or_path, revision=revision, allow_patterns=patterns, **download_kwargs))
    index = folder / "model.safetensors.index.json"
    names = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: a lean checkpoint needs its LLM as safetensors. Save the LLM with save_pretrained first, or save the "
                "checkpoint with lean=False."
            )
    return files


def iterate_weights(
    name_or_path: str, revision: str | None = None, **download_kwargs
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    The tensors of an LLM's safetensors files, one at a time and in the order of their names, as its base model names them.

    A causal-LM checkpoint and its base model give the same names: the prefix `model.` is dropped and `lm_head` is left out.
    """
    places = {}
    for file in _weight_files(name_or_path, revision, **download_kwargs):
        with safe_open(file, framework="pt") as tensors:
            places.update(
                {key.removeprefix("model."): (file, key) for key in tensors.keys() if not key.startswith("lm_head.")}
            )
    for name in sorted(places):
        file, key = places[name]
        with safe_open(file, framework="pt") as tensors:
            yield name, tensors.get_tensor(key)


def weights_sha256(name_or_path: str, revision: str | None = None, **download_kwargs) -> str:
    """
    Content hash of an LLM: SHA-256 over name, dtype, shape and bytes of every tensor, the same however the files are sharded.

    Raises:
        FileNotFoundError: If the model has no safetensors files.
    """
    digest = hashlib.sha256()
    for name, tensor in iterate_weights(name_or_path, revision, **download_kwargs):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_same_weights(text_model: nn.Module, name_or_path: str, revision: str | None = None) -> None:
    """
    Check that the LLM in memory is the one that its reference holds, in the dtype that it was loaded in.

    Raises:
        ValueError: Naming the first tensor that differs: a lean checkpoint of a changed LLM would lose the change.
    """
    state = text_model.state_dict()
    for name, tensor in iterate_weights(name_or_path, revision):
        if name not in state:
            continue  # not part of the base model, such as a vision tower beside it
        ours = state.pop(name)
        if not torch.equal(ours.cpu(), tensor.to(ours.dtype)):
            raise ValueError(_changed(name, name_or_path))
    if state:
        raise ValueError(_changed(next(iter(state)), name_or_path))


def _changed(tensor_name: str, name_or_path: str) -> str:
    return (
        f"text_model.{tensor_name} is not what {name_or_path} holds: the LLM was changed since, and a lean checkpoint would lose that. "
        "Save the checkpoint with lean=False, or save the LLM by itself (model.text_model.save_pretrained) and set "
        "model.config.text_model_name_or_path to that folder."
    )
