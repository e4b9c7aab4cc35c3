"""Encodes many texts with a frozen text model: tokenised once, sorted by length, in batches under a budget of padded tokens."""

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoModel, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase

from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from modeling_proclip.identity import (
    config_values,
    library_versions,
    llm_config_values,
    module_sha256,
    state_sha256,
    tokenizer_values,
)
from modeling_proclip.lean_checkpoint import text_model_sha256
from modeling_proclip.packing import pack_rows, why_padded
from modeling_proclip.rotary import rotary_boundary
from trainers.compute.dtypes import ModelDtype, default_device, loading_dtype
from trainers.compute.onednn import fastest_linear
from trainers.storage.model_files import loading_from

from .token_batches import TokenRow, length_sorted_batches, pad_rows


# Padded tokens in a batch. On two CPU cores 1,000 encode faster than 8,000, whose activations leave the caches; a GPU wants to be filled.
CPU_TOKEN_BUDGET = 1_000
GPU_TOKEN_BUDGET = 16_384

# These were trained on texts padded to full length, without a mask, and pool the last position: a shorter padding changes the embedding.
_PADDED_TO_FULL_LENGTH = ("siglip", "siglip2")

# Raised when our own code (template, tokenisation, pooling) gives other embeddings of the same text than the release before.
ENCODING_VERSION = 1

# The "pooling" of a model with two towers, whose projected embeddings are stored.
OF_TWO_TOWERS = "get_text_features"

# Their tokens tell two tokenisations apart: another script, white space at both ends, a spelled-out special token. They are short, so
# that none is cut.
_PROBE_TEXTS = ("A red fox", " 3 dogs\n", "猫 🦊", "<s>")

# A tokenizer keeps truncation and padding as its state, so that two threads that call one disturb each other.
_tokenizing = threading.Lock()


class EncodedBatch(NamedTuple):
    """A batch of embeddings.

    Attributes:
        indices: positions of the batch's texts among the texts that were given.
        embeddings: `(len(indices), dim)`, on the model's device and in its dtype, not normalised.
        num_truncated: texts of the batch that were longer than the model reads.
    """

    indices: list[int]
    embeddings: torch.Tensor
    num_truncated: int


def encode_texts(
    texts: Sequence[str],
    model: torch.nn.Module,
    processor: Any,
    *,
    token_budget: int | None = None,
    packed: bool | None = None,
) -> Iterator[EncodedBatch]:
    """Embeds `texts`, the longest first, in batches of similar length: packed without padding on a GPU, padded elsewhere.

    Both give the same embeddings up to rounding. On the CPU packing has nothing to save: batches are sorted by length, and SDPA takes a mask
    at no cost. All texts are tokenised by the call itself, before the first batch is asked for: give a window of a long stream at a time, and call
    for the next one in a thread (see [`one_ahead`]).

    Args:
        texts: the texts.
        model: a [`ProCLIPModel`], for the pooled embeddings of its LLM before the adapter (`get_llm_embeds`, `(N, hidden_size)`), or a
            two-tower model such as `CLIPModel`, for its projected text embeddings (`get_text_features`, `(N, projection_dim)`). It is put
            in eval mode and runs without gradient.
        processor: a [`ProCLIPProcessor`] for a `ProCLIPModel`; a `CLIPProcessor` or the tokenizer for a CLIP.
        token_budget: most padded tokens (texts times the longest of them) in a batch; a single text may have more. By default 1,000 on
            the CPU and 16,384 on a GPU.
        packed: whether a ProCLIP's texts are packed. By default on a GPU, if the LLM can; see [`why_padded`].

    Returns:
        [`EncodedBatch`]es, made as they are asked for; every text is in exactly one.

    Raises:
        ValueError: If the model has no text side, the processor does not fit it, the budget is not positive, `packed` texts are asked of a
            model that cannot, or a text is so long that its positions would depend on the texts before it (dynamic RoPE).
    """
    text_tower = _text_tower(model, processor)
    device = next(text_tower.parameters()).device
    if token_budget is None:
        token_budget = CPU_TOKEN_BUDGET if device.type == "cpu" else GPU_TOKEN_BUDGET
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")
    tokenizer = _tokenizer(processor)
    packed = _packs(model, device, packed)
    rows, truncated = _tokenize(texts, model, processor)
    _check_vocabulary(text_tower, rows)
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    boundary = rotary_boundary(getattr(text_tower, "config", None), longest)

    def inputs_of(indices: list[int]) -> dict[str, Any]:
        batch = [rows[i] for i in indices]
        inputs = pack_rows(batch) if packed else pad_rows(batch, tokenizer.pad_token_id, tokenizer.padding_side)
        return _on_device(inputs, device)

    batches = length_sorted_batches(rows, token_budget, boundary=boundary)
    prepared = ((indices, inputs_of(indices)) for indices in batches)
    return (
        EncodedBatch(indices, embeddings, sum(truncated[i] for i in indices))
        for indices, embeddings in _embed(model, prepared, device)
    )


def _embed(
    model: torch.nn.Module, prepared: Iterator[tuple[list[int], dict[str, Any]]], device: torch.device
) -> Iterator[tuple[list[int], torch.Tensor]]:
    model.eval()
    following = next(prepared, None)
    while following is not None:
        indices, inputs = following
        with torch.no_grad(), fastest_linear(device):
            if isinstance(model, ProCLIPModel):
                embeddings = model.get_llm_embeds(**inputs)
            else:
                embeddings = embeddings_of(model.get_text_features(**inputs))
        # A GPU computes by itself until somebody looks at the embeddings: meanwhile the next batch is packed and copied.
        following = next(prepared, None)
        yield indices, embeddings


def embeddings_of(features: Any) -> torch.Tensor:
    """The `(N, dim)` embeddings in what `get_text_features` or `get_image_features` returned: a tensor, or an output with `pooler_output`."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def count_truncated(texts: Sequence[str], model: torch.nn.Module, processor: Any) -> int:
    """How many of `texts` are longer than the model reads, so that [`encode_texts`] cuts them."""
    return sum(sum(_tokenize(texts[i : i + 4096], model, processor)[1]) for i in range(0, len(texts), 4096))


def characters_read(text: str, model: torch.nn.Module, processor: Any) -> int:
    """How many characters of `text` the model reads: what comes after them changes nothing. A word that is cut counts whole."""
    (tokens,), (truncated,) = _tokenize([text], model, processor)
    if not truncated:
        return len(text)
    # Halved until one character fewer gives other tokens, as tokenizers and templates each count in their own way.
    too_few, enough = 0, len(text)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if _tokenize([text[:middle]], model, processor)[0] == [tokens]:
            enough = middle
        else:
            too_few = middle
    return enough


def load_encoder(
    name_or_path: str,
    device: str | None = None,
    dtype: ModelDtype = "stored",
    attn_implementation: str | None = None,
) -> tuple[torch.nn.Module, Any]:
    """Loads a text model with its processor, ready for [`encode_texts`]: `(model, processor)`, a `ProCLIPModel` with its `ProCLIPProcessor`, or another
    model with its tokenizer.

    Args:
        name_or_path: folder or Hub name of a ProCLIP checkpoint, or of a CLIP or SigLIP.
        device: "cpu", "cuda", ...; the GPU by default if there is one.
        dtype: of the model; "stored": as its checkpoint has it, "auto": bfloat16 where the device multiplies it natively, else float32.
        attn_implementation: such as "sdpa", "eager" or "flash_attention_2"; by default the library's choice.

    Raises:
        OSError, ImportError: If nothing can be loaded from there, or the attention needs a package that is not installed.
        ValueError: If the model has no text side.
    """
    device = device or default_device()
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with loading_from((name_or_path, None)):
        model = AutoModel.from_pretrained(name_or_path, **loading_dtype(dtype, device), **attention)
        _check_text_side(model)
        model.to(device)
        loader = AutoProcessor if isinstance(model, ProCLIPModel) else AutoTokenizer
        return model, loader.from_pretrained(name_or_path)


def text_dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype in which `model` reads texts."""
    tower = model.text_model if isinstance(model, ProCLIPModel) else model
    return next(parameter.dtype for parameter in tower.parameters() if parameter.is_floating_point())


def encoder_fingerprint(model: torch.nn.Module, processor: Any) -> dict[str, Any]:
    """What decides the embeddings that [`encode_texts`] gives, as JSON: two encoders with the same fingerprint give the same.

    Returns:
        - "model" and "revision": where the text model came from; "text_model_sha256": for a ProCLIP, the hash of the LLM's files, whatever
          dtype it was loaded in, as its checkpoints record it. These three tell people and trainers which model it was, and are not
          compared ([`~trainers.text_store.layout.PROVENANCE`]).
        - "model_dtype": see [`text_dtype`]; "weights_sha256": the hash of the text model's weights in that dtype, see [`module_sha256`].
        - "config": the values of its configuration, see [`config_values`].
        - "pooling", and what [`tokenization_values`] says of `processor`.
        - "encoding": [`ENCODING_VERSION`]; "versions": see [`library_versions`].

    Raises:
        ValueError: If the model has no text side or the processor does not fit it.
    """
    _text_tower(model, processor)
    if isinstance(model, ProCLIPModel):
        state = model.text_model.state_dict()
        weights, recorded = state_sha256(state), model.config.text_model_sha256
        values = {
            "model": model.config.text_model_name_or_path,
            "revision": model.config.text_model_revision,
            "text_model_sha256": weights if weights == recorded else text_model_sha256(model.config, state),
            "model_dtype": str(text_dtype(model)).removeprefix("torch."),
            "weights_sha256": weights,
            "config": llm_config_values(model.text_model.config),
            "pooling": model.config.text_pooling,
        }
    else:
        # The text tower, and its projection if it has one; all of a model that names its parts otherwise.
        parts = [part for name, part in model.named_children() if name.startswith("text_")] or [model]
        config = config_values(getattr(model, "config", None))  # a module of your own need not have one
        values = {
            "model": getattr(model, "name_or_path", None) or None,
            "revision": None,
            "model_dtype": str(text_dtype(model)).removeprefix("torch."),
            "weights_sha256": hashlib.sha256("".join(map(module_sha256, parts)).encode()).hexdigest(),
            "config": {key: value for key, value in config.items() if key != "vision_config"},
            "pooling": OF_TWO_TOWERS,
        }
    return {
        **values,
        **tokenization_values(model, processor),
        "encoding": ENCODING_VERSION,
        "versions": library_versions(),
    }


def tokenization_values(model: torch.nn.Module, processor: Any) -> dict[str, Any]:
    """What makes tokens of a text, as JSON; of a ProCLIP also without its LLM: "prompt_template", "instruction", "max_length" (tokens), "tokenizer" (see
    [`tokenizer_values`]) and "tokens_sha256", of the tokens that all of this, in the installed release of the libraries, makes of a few texts.
    """
    proclip = isinstance(model, ProCLIPModel)
    return {
        "prompt_template": processor.prompt_template if proclip else None,
        "instruction": processor.instruction if proclip else None,
        "max_length": _max_length(model, processor),
        "tokenizer": tokenizer_values(_tokenizer(processor)),
        "tokens_sha256": hashlib.sha256(json.dumps(_tokenize(_PROBE_TEXTS, model, processor)[0]).encode()).hexdigest(),
    }


def shorten(text: str, length: int = 60) -> str:
    """`text` quoted for a message, its end cut."""
    return repr(text if len(text) <= length else text[:length] + "...")


def _check_text_side(model: torch.nn.Module) -> None:
    if isinstance(model, ProCLIPModel):
        if model.text_model is None:
            raise ValueError(
                "this ProCLIPModel was loaded without its LLM (load_text_model=False): load it whole to embed texts"
            )
    elif not callable(getattr(model, "get_text_features", None)):
        raise ValueError(f"{type(model).__name__} has no text side: give a ProCLIP checkpoint, or a CLIP or SigLIP")


def _text_tower(model: torch.nn.Module, processor: Any) -> torch.nn.Module:
    """The part of `model` that reads texts; ValueError if there is none or `processor` is not the one for it."""
    _check_text_side(model)
    if isinstance(model, ProCLIPModel) and not isinstance(processor, ProCLIPProcessor):
        raise ValueError(
            f"a ProCLIPModel needs its ProCLIPProcessor, which carries the prompt template, not a {type(processor).__name__}"
        )
    return model.text_model if isinstance(model, ProCLIPModel) else model


def _packs(model: torch.nn.Module, device: torch.device, packed: bool | None) -> bool:
    if not isinstance(model, ProCLIPModel):
        return False
    wanted = device.type == "cuda" if packed is None else packed
    reason = why_padded(model.text_model) if wanted else None
    if packed and reason is not None:
        raise ValueError(f"the texts of this model cannot be packed: {reason}")
    return wanted and reason is None


def _check_vocabulary(text_tower: torch.nn.Module, rows: Sequence[TokenRow]) -> None:
    """ValueError if a tokenizer gives tokens that the model does not have: on a GPU they would end the process."""
    config = getattr(text_tower, "config", None)  # a module of your own need not have one
    size = getattr(getattr(config, "text_config", config), "vocab_size", None)
    largest = max((max(row["input_ids"], default=0) for row in rows), default=0)
    if size is not None and largest >= size:
        raise ValueError(
            f"the tokenizer gives token {largest:,}, and the model has {size:,} tokens: they do not belong together"
        )


def _on_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """`inputs` with their tensors, of whole numbers, on `device`: on CUDA by one copy from pinned memory, for which the host does not wait."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if device.type != "cuda":
        return {**inputs, **{name: tensor.to(device) for name, tensor in tensors.items()}}
    joined = torch.cat([tensor.flatten().long() for tensor in tensors.values()]).pin_memory()
    parts = joined.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors.values()])
    copied = {
        name: part.view(tensor.shape).to(tensor.dtype)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }
    return {**inputs, **copied}


def _tokenizer(processor: Any) -> PreTrainedTokenizerBase:
    return processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer


def _max_length(model: torch.nn.Module, processor: Any) -> int:
    if isinstance(model, ProCLIPModel):
        return processor.max_length
    tokenizer_length = _tokenizer(processor).model_max_length
    text_config = getattr(
        getattr(model, "config", None), "text_config", None
    )  # a module of your own need not have a config
    if text_config is None:
        return tokenizer_length
    # RoBERTa has two positions more than its tokenizer may use; CLIP's tokenizer may not know a limit at all.
    return min(text_config.max_position_embeddings, tokenizer_length)


def _tokenize(
    texts: Sequence[str], model: torch.nn.Module, processor: Any
) -> tuple[list[dict[str, list[int]]], list[bool]]:
    """The model inputs of each text, unpadded unless the model needs full length, and whether the text was cut."""
    texts = list(texts)
    if not texts:
        return [], []
    tokenizer, max_length = _tokenizer(processor), _max_length(model, processor)
    with _tokenizing:
        if isinstance(model, ProCLIPModel):
            encoded, literally = processor(text=texts, padding=False), {"split_special_tokens": True}
        elif getattr(getattr(model, "config", None), "model_type", None) in _PADDED_TO_FULL_LENGTH:
            encoded, literally = tokenizer(texts, truncation=True, padding="max_length", max_length=max_length), {}
            encoded = {"input_ids": encoded["input_ids"]}
        else:
            encoded, literally = tokenizer(texts, truncation=True, max_length=max_length), {}
        rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        full = [i for i, row in enumerate(rows) if len(row["input_ids"]) == max_length]
        truncated = [False] * len(rows)
        if full:
            whole = tokenizer([texts[i].rstrip() for i in full], verbose=False, **literally)["input_ids"]
            for i, tokens in zip(full, whole, strict=True):
                truncated[i] = len(tokens) > max_length
    return rows, truncated
