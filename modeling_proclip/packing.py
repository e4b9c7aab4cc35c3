"""Texts packed into one row, without padding: each token attends to the tokens of its own text.

Padding is the least of what a padded batch costs; masks, repeated key heads and the kernels that take them cost more, and a packed row has
none. It goes through the LLM with positions that start anew at every text and with the texts' bounds, as Transformers' FlashAttention takes
them, so `flash_attention_2`, `_3` and `_4` need nothing more. For any other implementation [`segment_attention`] stands in.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .segment_attention import HAS_VARLEN, SEGMENT_ATTENTION


logger = logging.get_logger(__name__)

_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
# Why the texts of an LLM are padded, by device, dtype and attention.
_TRIED: WeakKeyDictionary[nn.Module, dict[tuple, str | None]] = WeakKeyDictionary()


def pack_rows(rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
    """Tokenised texts as one row, for [`ProCLIPModel.get_llm_embeds`] or an LLM itself.

    Args:
        rows: of each text its "input_ids" and, for the pooling, its "token_type_ids", not padded and not empty.

    Returns:
        "input_ids", "position_ids" and, if given, "token_type_ids" `(1, num_tokens)` int64; "cu_seq_lens_q" and "cu_seq_lens_k", where each
        text begins and the last one ends, `(num_texts + 1,)` int32; "max_length_q" and "max_length_k", the tokens of the longest, `int`.

    Raises:
        ValueError: If a text has no tokens.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    if 0 in lengths:
        raise ValueError(f"text {lengths.index(0)} of the batch has no tokens, so it has no embedding.")
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    names = [name for name in ("input_ids", "token_type_ids") if name in rows[0]]
    return {
        **{name: torch.tensor([[token for row in rows for token in row[name]]]) for name in names},
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def pack_batch(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
) -> tuple[dict[str, Any], torch.Tensor] | None:
    """A padded batch as one row, made on its device. The host waits for the device twice.

    Args:
        input_ids, attention_mask, token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): From [`ProCLIPProcessor`].

    Returns:
        What [`pack_rows`] returns, and the places `(num_tokens,)` of its tokens in the flattened batch; or None if a text has no tokens.
    """
    attended = attention_mask.bool()
    lengths = attended.sum(dim=1)
    shortest, longest = torch.stack([lengths.min(), lengths.max()]).tolist()
    if shortest == 0:
        return None
    places = attended.flatten().nonzero()[:, 0]
    bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    rows = {"input_ids": input_ids, "position_ids": attended.cumsum(1) - 1, "token_type_ids": token_type_ids}
    return {
        **{name: values.flatten()[places][None] for name, values in rows.items() if values is not None},
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }, places


@contextmanager
def attending_by_segments(text_model: nn.Module) -> Iterator[None]:
    """The context in which `text_model` takes packed rows: by its own FlashAttention if it has that, else by [`segment_attention`].

    Raises:
        ValueError: If activations are to be computed again in the backward pass, which is outside of this context.
    """
    before = text_model.config._attn_implementation
    if before in _FLASH:
        yield
        return
    if text_model.training and torch.is_grad_enabled() and recomputes_activations(text_model):
        raise ValueError(
            "packed texts are not trained with gradient checkpointing: without it, or by attn_implementation='flash_attention_2', they are."
        )
    text_model.config._attn_implementation = SEGMENT_ATTENTION
    try:
        yield
    finally:
        text_model.config._attn_implementation = before


def recomputes_activations(text_model: nn.Module) -> bool:
    """Whether gradient checkpointing is on."""
    return any(
        isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
        for layer in text_model.modules()
    )


def why_padded(text_model: nn.Module) -> str | None:
    """Why the texts of this LLM have to be padded, or None if they can be packed. It is tried: three short texts must get the states that each
    gets alone, and another text in the middle must not change its neighbours. Tried once for a model, device, dtype and attention.
    """
    weight = text_model.get_input_embeddings().weight
    place = (weight.device, weight.dtype, text_model.config._attn_implementation)
    known = _TRIED.setdefault(text_model, {})
    if place not in known:
        known[place] = _try_packing(text_model)
        if known[place] is not None and weight.is_cuda:
            logger.warning(f"Texts of {type(text_model).__name__} are padded, not packed: {known[place]}.")
    return known[place]


def packs(text_model: nn.Module, device: torch.device) -> bool:
    """Whether texts go through this LLM faster if they are packed: on CUDA, if they can be."""
    return device.type == "cuda" and why_padded(text_model) is None


@torch.no_grad()
def _try_packing(text_model: nn.Module) -> str | None:
    weight = text_model.get_input_embeddings().weight
    if weight.device.type == "meta":
        return "it is offloaded"
    if weight.is_cuda and text_model.config._attn_implementation not in _FLASH:
        if not HAS_VARLEN:
            return "this PyTorch has no variable-length attention with a scale and a window"
        if weight.dtype not in (torch.float16, torch.bfloat16):
            return f"the variable-length kernel takes float16 and bfloat16, not {weight.dtype}"
    tokens = torch.arange(1, 13).remainder(len(weight)).tolist()
    texts = [tokens[:5], tokens[5:8], tokens[8:]]
    was_training = {module: module.training for module in text_model.modules()}
    text_model.eval()
    try:
        alone = torch.cat(
            [
                text_model(input_ids=weight.new_tensor([text], dtype=torch.long), use_cache=False).last_hidden_state[0]
                for text in texts
            ]
        )
        packed, other = (_packed_states(text_model, some) for some in (texts, [texts[0], texts[0][:3], texts[2]]))
    except (ValueError, TypeError, RuntimeError, NotImplementedError, KeyError) as error:
        return f"{error}".splitlines()[0] if str(error) else type(error).__name__
    finally:
        for module, training in was_training.items():
            module.training = training
    change = ((packed - alone).float().norm(dim=-1) / alone.float().norm(dim=-1)).max().item()
    if not change < max(1e-4, 16 * torch.finfo(packed.dtype).eps):
        return f"a packed text gets other states than alone (they change by {change:.2g} of their length)"
    moved = (packed - other).float().norm(dim=-1)
    if moved[[0, 1, 2, 3, 4, 8, 9, 10, 11]].max() > moved[5:8].max() / 100:
        return "a packed text changes its neighbours"
    return None


def _packed_states(text_model: nn.Module, texts: list[list[int]]) -> torch.Tensor:
    device = text_model.get_input_embeddings().weight.device
    packed = pack_rows([{"input_ids": text} for text in texts])
    packed = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in packed.items()}
    with attending_by_segments(text_model):
        return text_model(**packed, use_cache=False).last_hidden_state[0]
