"""What decides the numbers of a model, as content: one notion of identity for lean checkpoints, text stores, feature caches and recipes.

Two models that agree in everything below give the same embedding of the same input, apart from rounding:

- their weights: SHA-256 over name, dtype, shape and bytes of every tensor, however they are sharded ([`state_sha256`], [`weights_sha256`]);
- their configuration: every value but those in `_NO_EFFECT`, such as names, paths and what only training reads ([`config_values`]);
- their tokenizer: hashes of each part of its serialised backend, and its settings ([`tokenizer_values`]);
- the releases of the libraries that compute them, as `major.minor` ([`library_versions`]): patch releases mend mistakes and leave numbers
  alone, so they count as the same.

Configuration and tokenizer are kept value by value rather than as one hash, so that a refusal can name what changed ([`differences`]).
"""

import hashlib
import json
import os
import reprlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast


# Keys of a configuration that change no embedding: where it came from, what only training or generation reads, and how attention is computed.
# What is not listed counts, also a key that a later release adds.
_NO_EFFECT = {
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",  # that of the weights is in their hash
    "id2label",
    "initializer_factor",
    "initializer_range",
    "is_causal",  # ProCLIP sets it
    "label2id",
    "logit_scale_init_value",
    "matryoshka_dims",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_SPECIAL_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}
# Parts of a serialised tokenizer: "truncation" and "padding" are what it was last called with, and "decoder" turns tokens into text.
_TOKENIZER_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "model", "added_tokens")
_ABSENT = object()


# Configuration


def config_values(config: Any) -> dict[str, Any]:
    """The values of a configuration, sub-configurations included, that change what the model computes, as JSON has them. Empty for a model that
    is not configured in the way of Transformers.
    """
    if not isinstance(config, PreTrainedConfig):
        return {}
    return _with_effect(json.loads(config.to_json_string(use_diff=False)))


def llm_config_values(config: PreTrainedConfig) -> dict[str, Any]:
    """[`config_values`] of a decoder LLM, without its special tokens: it embeds the tokens that it is given, whatever they stand for."""
    return {key: value for key, value in config_values(config).items() if key not in _SPECIAL_TOKENS}


def load_llm_config(
    name_or_path: str | os.PathLike, revision: str | None = None, **download_kwargs: Any
) -> PreTrainedConfig:
    """The configuration of a decoder LLM, or of the decoder in a model of several parts. ValueError if only code that comes with it can read it."""
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, revision=revision or "main", trust_remote_code=False, **download_kwargs
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name_or_path} needs code of its own, which is not run. If you trust it, load it yourself "
            "(AutoModel.from_pretrained(..., trust_remote_code=True)) and pass the model."
        ) from error
    return config.get_text_config()


def _with_effect(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _with_effect(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _NO_EFFECT and "dropout" not in key and not key.endswith("pdrop")
    }


# Tokenizer


def tokenizer_values(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What turns a text into tokens: a SHA-256 of each part of the tokenizer, and its settings, as JSON."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        parts = {part: _json_sha256(backend.get(part)) for part in _TOKENIZER_PARTS}
    else:  # one in Python: its files, but for the settings below and where it came from
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = [file for file in sorted(Path(folder).iterdir()) if file.name != "tokenizer_config.json"]
            hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
            parts = {"class": type(tokenizer).__name__, **hashes}
    return {
        **parts,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "pad_token_id": tokenizer.pad_token_id,
        "split_special_tokens": tokenizer.split_special_tokens,
        "model_input_names": list(tokenizer.model_input_names),
    }


# Libraries


def library_versions(names: Iterable[str] = ("transformers", "tokenizers")) -> dict[str, str]:
    """The releases of libraries that compute embeddings, as `major.minor`."""
    return {name: ".".join(version(name).split(".")[:2]) for name in names}


# Comparison


def differences(there: Mapping[str, Any], here: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """What two descriptions differ in, one after the other, as "config.hidden_act is 'silu' there and 'relu' here".

    A key that only one of them has, and that says nothing (None, False or empty), is no difference: releases add such keys.
    """
    for key in {**there, **here}:
        one, other = there.get(key, _ABSENT), here.get(key, _ABSENT)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from differences(one, other, f"{within}{key}.")
        elif one != other and not (one is _ABSENT and not other) and not (other is _ABSENT and not one):
            yield f"{within}{key} is {_shown(one)} there and {_shown(other)} here"


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "not given"
    return repr(value) if isinstance(value, str) else reprlib.repr(value)


# Weights in memory


def state_sha256(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Content hash of a state dict: SHA-256 over name, dtype, shape and bytes of every tensor, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        _update(digest, name, tensor.cpu())
    return digest.hexdigest()


def module_sha256(module: nn.Module) -> str:
    """[`state_sha256`] of a module. That of an LLM is the hash of its files ([`weights_sha256`]) as long as it is in their dtype."""
    return state_sha256(module.state_dict())


def own_weights_sha256(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Content hash of what of a ProCLIP's state dict is not the LLM's, in float32: the same for a full and for a lean checkpoint of it."""
    own = {name: tensor.float() for name, tensor in state_dict.items() if not name.startswith("text_model.")}
    return state_sha256(own)


def _update(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())


# Weights in files


def weights_sha256(
    name_or_path: str | os.PathLike,
    revision: str | None = None,
    *,
    same_as: Mapping[str, torch.Tensor] | None = None,
    **download_kwargs: Any,
) -> str:
    """Content hash of an LLM's files, without loading it: [`state_sha256`] of its base model in the dtypes of the files. A checkpoint of a causal
    LM and that of its base model have the same.

    The files are those that `from_pretrained` reads. A folder from which it would load anything besides them is refused.

    Args:
        same_as (`dict[str, torch.Tensor]`, *optional*):
            State dict of an LLM in memory that must hold the same weights, each in the dtype that it has there. Tensors on "meta", which
            are offloaded to disk, are not compared.

    Raises:
        FileNotFoundError: If the model has no safetensors files.
        ValueError: Naming a tensor that the files lack or hold twice, an adapter beside them, or the first tensor of `same_as` that
            differs.
    """
    weights = _iterate_weights(name_or_path, revision, **download_kwargs)
    digest = hashlib.sha256()
    for name, tensor in weights if same_as is None else _compared(weights, same_as, name_or_path):
        _update(digest, name, tensor)
    return digest.hexdigest()


def check_same_weights(
    state_dict: Mapping[str, torch.Tensor],
    name_or_path: str | os.PathLike,
    revision: str | None = None,
    **download_kwargs: Any,
) -> None:
    """Raises `WeightsDifferError` if `state_dict` is not what the files hold that [`weights_sha256`] reads; costs one reading of them."""
    for _ in _compared(_iterate_weights(name_or_path, revision, **download_kwargs), state_dict, name_or_path):
        pass


class WeightsDifferError(ValueError):
    """An LLM in memory does not hold what its files do: a tensor differs, or only one of them has it."""


def _compared(
    weights: Iterator[tuple[str, torch.Tensor]],
    state_dict: Mapping[str, torch.Tensor],
    name_or_path: str | os.PathLike,
) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights` as they are, each compared with the tensor of its name."""
    in_memory = dict(state_dict)
    differs = "text_model.{} is not what " + f"{name_or_path} holds"
    for name, tensor in weights:
        ours = in_memory.pop(name, None)
        if ours is None or not _equal(ours, tensor):
            raise WeightsDifferError(differs.format(name))
        yield name, tensor
    if in_memory:
        raise WeightsDifferError(differs.format(next(iter(in_memory))))


def _equal(ours: torch.Tensor, tensor: torch.Tensor) -> bool:
    return ours.device.type == "meta" or torch.equal(ours.cpu(), tensor.to(ours.dtype))


def _iterate_weights(
    name_or_path: str | os.PathLike, revision: str | None, **download_kwargs: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an LLM's safetensors files, one at a time and in the order of their names, as its base model names them."""
    config = load_llm_config(name_or_path, revision, **download_kwargs)
    with torch.device("meta"):
        base_model = AutoModel.from_config(config, trust_remote_code=False)
    names, prefix = set(base_model.state_dict()), base_model.base_model_prefix + "."
    places: dict[str, tuple[Path, str]] = {}
    for file in _weight_files(name_or_path, revision, **download_kwargs):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():
                name = key.removeprefix(prefix)
                if name in places:
                    raise ValueError(
                        f"{name_or_path} holds the tensor {name!r} twice, as {places[name][1]!r} in {places[name][0].name} and as {key!r} in "
                        f"{file.name}: which one is meant? Load the LLM and save it again with save_pretrained."
                    )
                places[name] = file, key
    if missing := names - set(places):
        raise ValueError(f"{name_or_path} has no tensor {min(missing)!r} of a {type(base_model).__name__}.")
    for name in sorted(names):
        file, key = places[name]
        with safe_open(file, framework="pt") as tensors:
            yield name, tensors.get_tensor(key)


def _weight_files(name_or_path: str | os.PathLike, revision: str | None, **download_kwargs: Any) -> list[Path]:
    """The safetensors files that `from_pretrained` loads: model.safetensors, or where there is none the shards of the index."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        patterns = ["model*.safetensors", "model.safetensors.index.json", "adapter_config.json"]
        folder = Path(
            snapshot_download(os.fspath(name_or_path), revision=revision, allow_patterns=patterns, **download_kwargs)
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder / 'adapter_config.json'}: this adapter would be loaded into the LLM beside it, whose weights alone have a hash. Merge it "
            "(merge_and_unload) and save the result, or move it into a folder of its own."
        )
    index = folder / "model.safetensors.index.json"
    sharded = index.is_file() and not (folder / "model.safetensors").is_file()
    names = set(json.loads(index.read_text())["weight_map"].values()) if sharded else {"model.safetensors"}
    files = [folder / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: a lean checkpoint needs its LLM as safetensors. Save the LLM with save_pretrained first, or save the "
                "checkpoint with lean=False."
            )
    return files


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
